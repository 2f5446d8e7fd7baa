"""What model.optimizer promises beside numbers: parameters that read as before, states that travel, clear refusals."""

import copy
import gc
import io
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import BudgetError, StateError
from geminifx.runtime.memory.lazy_parameter import LazyParameter
from geminifx.runtime.optimizer.chunk_optimizer import GROWTH_STEPS, ChunkOptimizer
from late_copies import BY_NAME
from optimizing import ADAMW, KINDS, NET, Loop, held_gradients, last, placed, plain, same_moments, same_weights
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR
from transformers import GPT2LMHeadModel
from zoo import BLOCKS, GPT2, OPT, compiled, opt, tokens

LATE = [pytest.param(engine, marks=pytest.mark.slow) for engine in BY_NAME]
pytestmark = [
    pytest.mark.usefixtures("copies"),
    pytest.mark.parametrize("copies", ["immediate", *LATE], indirect=True),
]


def ours(where: str = "mixed", precision: str | None = None, **declared: Any) -> tuple[Any, ChunkOptimizer]:
    model = placed(NET, where, precision)
    return model, model.optimizer(ADAMW[0], **ADAMW[1], **declared)


def backward(model: nn.Module, seed: int = 0) -> None:
    NET.loss(model, NET.batch(seed=seed)).backward()


# -- what is declared --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "declared", "message"),
    [
        (
            torch.optim.Adagrad,
            {},
            "kind=<class 'torch.optim.adagrad.Adagrad'>; expected one of torch.optim.Adam, torch.",
        ),
        (AdamW([nn.Parameter(torch.ones(1))]), {}, "takes the class torch.optim.AdamW, not an instance of it"),
        (AdamW, {"amsgrad": True}, "model.optimizer(amsgrad=True) is not supported"),
        (SGD, {"maximize": True}, "model.optimizer(maximize=True) is not supported"),
        (AdamW, {"accumulate": 0}, "accumulate=0; expected how many backwards make one step"),
        (AdamW, {"accumulate": True}, "accumulate=True; expected how many"),
        (AdamW, {"accumulate": 2.0}, "accumulate=2.0; expected how many"),
        (AdamW, {"max_grad_norm": 0}, "max_grad_norm=0; expected a positive number"),
        (AdamW, {"max_grad_norm": float("nan")}, "max_grad_norm=nan; expected a positive number"),
        (AdamW, {"max_grad_norm": "1"}, "max_grad_norm='1'; expected a positive number"),
        (AdamW, {"max_grad_norm": 1.0, "in_backward": True}, "leave one of the two out"),
        (AdamW, {"lr": -1.0}, "lr=-1.0; expected a number, 0 or more"),
    ],
)
def test_what_is_not_there_or_does_not_go_together(kind: Any, declared: dict[str, Any], message: str) -> None:
    model = compiled(NET)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.optimizer(kind, **declared)
    # Nothing has happened: a generic optimizer still trains it.
    reference, expected = plain(NET, AdamW)
    Loop(steps=2).run(NET, reference, expected)
    Loop(steps=2).run(NET, model, AdamW(model.parameters(), fused=True))
    assert same_weights(model, reference)


def test_in_backward_does_not_go_with_float16() -> None:
    with pytest.raises(ValueError, match="whether a float16 gradient has overflowed; leave it out"):
        compiled(NET, precision="fp16").optimizer(AdamW, in_backward=True)


def test_there_is_one_optimizer() -> None:
    model, optimizer = ours()
    backward(model)
    with pytest.raises(StateError, match=r"was called before.*param_groups, add_param_group"):
        model.optimizer(AdamW)
    optimizer.step()
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    backward(reference)
    expected.step()
    assert same_weights(model, reference)


def test_an_optimizer_made_after_an_evaluation_is_planned_for() -> None:
    model = geminifx.compile(NET.seeded())
    batch = NET.batch()
    with torch.no_grad():
        model(next(iter(batch.values())))
    assert not model.plan.format.beside
    model.optimizer(AdamW)
    assert model.plan.format.beside and "the model's own" in str(model.plan)


def test_parameters_of_another_model_are_refused() -> None:
    model = compiled(NET)
    with pytest.raises(ValueError, match=r"of shape \(48, 48\) does not belong to the compiled model"):
        model.optimizer(AdamW, NET.seeded().parameters())
    assert model.optimizer(AdamW, model.parameters()).param_groups[0]["lr"] == 1e-3


def test_groups_that_ask_for_what_is_not_there() -> None:
    model, optimizer = ours()
    backward(model)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize=True"):
        optimizer.step()
    optimizer.param_groups[0]["maximize"] = False
    optimizer.step()
    model = placed(NET, "mixed")
    optimizer = model.optimizer(SGD, lr=0.1)
    backward(model)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(StateError, match=r"the momentum of a group is 0\.9, but no group had momentum when"):
        optimizer.step()


# -- in_backward refuses what it cannot do -----------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_and_backwards_keep_to_what_was_declared(accumulate: int) -> None:
    model, optimizer = ours(in_backward=True, accumulate=accumulate)
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    for seed in range(accumulate):
        if seed:
            with pytest.raises(StateError, match=r"step\(\) came after 1 of accumulate=2 backwards"):
                optimizer.step()
        for each in (model, reference):
            backward(each, seed)
    with pytest.raises(StateError, match=rf"more than accumulate={accumulate} times before optimizer.step\(\)"):
        backward(model, 9)
    for zero_grad in (optimizer.zero_grad, model.zero_grad):
        with pytest.raises(StateError, match=r"zero_grad\(\) was called between the last backward\(\) of a step and"):
            zero_grad()
    for optim in (optimizer, expected):
        optim.step()
        optim.zero_grad()
    assert same_weights(model, reference)
    model.zero_grad()
    optimizer.step()  # as torch's, which does nothing without gradients
    loop = Loop(micro=accumulate)
    loop.run(NET, model, optimizer)
    loop.run(NET, reference, expected)
    assert same_weights(model, reference)


def test_zero_grad_drops_a_part_of_a_sum() -> None:
    model, optimizer = ours(in_backward=True, accumulate=2)
    backward(model, 7)
    optimizer.zero_grad()
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    for each, optim in ((model, optimizer), (reference, expected)):
        Loop(micro=2).run(NET, each, optim)
    assert same_weights(model, reference)


def test_gradients_that_are_used_up_are_neither_read_nor_set() -> None:
    model, optimizer = ours(in_backward=True)
    backward(model)
    parameter = next(model.parameters())
    assert parameter.grad is not None, "as wrappers of loops ask"
    with pytest.raises(StateError, match=r"gradient of 0.0.weight cannot be read.*pass max_grad_norm="):
        parameter.grad.norm()
    with pytest.raises(StateError, match="cannot be set"):
        parameter.grad = torch.zeros(48, 48)
    with pytest.raises(StateError, match="cannot be read"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert parameter.grad is None


def test_a_backward_that_fails_half_way_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With in_backward some parameters are of the new step already; by default none are."""
    for in_backward in (False, True):
        model, optimizer = ours("device", in_backward=in_backward)
        before = model.state_dict()
        called = model.session.last["training"].executor.called
        put, calls = called.put_sum, iter(range(100))

        def failing(*args: Any, put: Any = put, calls: Any = calls) -> None:
            if next(calls) == 2:
                raise KeyboardInterrupt
            put(*args)

        called.put_sum = failing
        with pytest.raises(KeyboardInterrupt):
            backward(model)
        called.put_sum = put
        if not in_backward:
            optimizer.zero_grad()
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            continue
        refused = pytest.raises(StateError, match="failed after some parameters were updated")
        for act in (optimizer.step, model.state_dict, optimizer.state_dict):
            with refused:
                act()
        with refused:
            backward(model)


# -- parameters --------------------------------------------------------------------------------------------


def test_parameters_stay_what_they_were() -> None:
    model = compiled(BLOCKS, precision="bf16")
    model.blocks[1][0].bias.requires_grad_(False)
    before = dict(model.named_parameters(remove_duplicate=False))
    known = {n: (id(p), p.shape, p.dtype, p.requires_grad) for n, p in before.items()}
    values = {n: p.detach().clone() for n, p in before.items()}
    model.optimizer(AdamW, in_backward=True)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert {n: (id(p), p.shape, p.dtype, p.requires_grad) for n, p in after.items()} == known
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in after.values())
    assert all(torch.equal(p, values[n]) and torch.equal(p.detach().cpu(), values[n]) for n, p in after.items()), (
        "a split pair is the float32 master, bit for bit"
    )
    assert after["head.weight"] is after["embed.weight"]


READS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda p: p.norm(),
    "row": lambda p: p[3],
    "transposed": lambda p: p.t(),
    "product of views": lambda p: p.t() @ p[:, ::2],
    "numpy": lambda p: torch.from_numpy(p.detach().numpy().copy()),
    "numpy of a row": lambda p: torch.from_numpy(p.detach()[1].numpy().copy()),
    "list": lambda p: torch.tensor(p.tolist()),
    "element": lambda p: torch.tensor(p[1, 2].item()),
    "split": lambda p: torch.cat([part * 2 for part in p.chunk(3)]),
    "iterated": lambda p: torch.stack(list(p)),
    "copied": lambda p: copy.deepcopy(p),
    "as float64": lambda p: p.to(torch.float64),
    "a copy that is written": lambda p: p.detach().clone().zero_() + p,
}


@pytest.mark.parametrize("read", READS)
def test_a_parameter_is_read_like_any_tensor(read: str, trained: Any) -> None:
    model, values = trained
    expected = READS[read](values["1.0.weight"])
    found = READS[read](model.get_parameter("1.0.weight"))
    assert torch.equal(found, expected) and found.dtype == expected.dtype and found.shape == expected.shape


@pytest.fixture(scope="module")
def trained() -> tuple[Any, dict[str, Tensor]]:
    """A model after one step, and its values."""
    model, optimizer = ours("mixed", "bf16")
    Loop(steps=1).run(NET, model, optimizer)
    return model, model.state_dict()


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda p: p.add_(1),
    "data.copy": lambda p: p.data.copy_(torch.zeros(48, 48)),
    "data": lambda p: setattr(p, "data", torch.zeros(48, 48)),
    "init": nn.init.normal_,
    "row": lambda p: p[0].zero_(),
    "element": lambda p: p.__setitem__((0, 0), 1.0),
    "view": lambda p: p.detach().view(-1).fill_(1),
    "view of a view": lambda p: p.t()[0].mul_(2),
    "part": lambda p: p.chunk(2)[1].sub_(1),
    "several": lambda p: torch._foreach_mul_([p], 2.0),
    "out": lambda p: torch.add(torch.ones(48, 48), 1, out=p),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_a_parameter_raises(write: str, trained: Any) -> None:
    model, values = trained
    with torch.no_grad(), pytest.raises(StateError, match=r"1\.0\.weight cannot be written.*load_state_dict"):
        WRITES[write](model.get_parameter("1.0.weight"))
    array = model.get_parameter("1.0.weight").detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array.fill(0)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_another_optimizer_cannot_step_over_them(options: dict[str, bool]) -> None:
    model, _ = ours("host")
    before = model.state_dict()
    for foreign in (SGD(model.parameters(), lr=0.1, **options), AdamW(model.parameters(), **options)):
        backward(model)
        with pytest.raises(StateError, match=r"step the optimizer that model\.optimizer\(\.\.\.\) returned"):
            foreign.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gradient_from_outside_of_the_model_is_not_lost_in_silence() -> None:
    model, _ = ours()
    parameter = model.get_parameter("1.0.weight")
    with pytest.raises(StateError, match="from outside the compiled model, for example from a penalty"):
        (NET.loss(model, NET.batch()) + parameter.square().sum()).backward()
    parameter.requires_grad_(False).requires_grad_(True)
    with pytest.raises(StateError, match="from outside"):
        parameter[0].sum().backward()
    parameter.register_hook(lambda gradient: gradient)
    with pytest.raises(StateError, match=r"1\.0\.weight has an autograd hook"):
        backward(model)


# -- state_dict of the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_come_back_exactly(precision: str) -> None:
    model = placed(BLOCKS, "mixed", precision)
    optimizer = model.optimizer(AdamW, lr=1e-2)
    Loop(steps=2).run(BLOCKS, model, optimizer)
    saved = model.state_dict()
    assert saved["head.weight"] is saved["embed.weight"]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    for copied in (torch.load(file), pickle.loads(pickle.dumps(saved))):
        assert all(type(t) is Tensor and torch.equal(t, saved[name]) for name, t in copied.items())
    Loop(steps=2).run(BLOCKS, model, optimizer, start=2)
    changed = model.state_dict()
    assert not torch.equal(changed["embed.weight"], saved["embed.weight"])
    assert model.load_state_dict(saved).missing_keys == []
    assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())
    # The programs compute with what was loaded.
    other = placed(BLOCKS, "host", precision)
    other.load_state_dict(saved)
    x = tokens()["input_ids"]
    assert torch.equal(model(x), other(x))


def test_loading_is_refused_between_forward_and_backward_and_for_other_shapes() -> None:
    model, _ = ours()
    saved = model.state_dict()
    loss = NET.loss(model, NET.batch())
    model.load_state_dict(saved)
    with pytest.raises(StateError, match="was changed in place between the call of the model and its backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.0\.weight"):
        model.load_state_dict({**saved, "1.0.weight": torch.zeros(3)})
    with torch.no_grad(), pytest.raises(StateError, match="cannot be written"):
        next(model.parameters()).copy_(torch.zeros(48, 48))
    assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())


def test_save_pretrained_and_back(tmp_path: Path) -> None:
    model = placed(GPT2, "mixed", "bf16")
    Loop(steps=1).run(GPT2, model, model.optimizer(AdamW, lr=1e-2, in_backward=True))
    model.save_pretrained(tmp_path / "model")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert same_weights(model, again)
    assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.parametrize("load_first", [False, True])
def test_models_without_values_get_them_before_or_after_the_optimizer(load_first: bool) -> None:
    reference, expected = plain(OPT, AdamW, lr=1e-2)
    weights = copy.deepcopy(reference.state_dict())
    with geminifx.init_empty():
        source = opt()
    model = geminifx.compile(source, **OPT.examples())
    if load_first:
        model.load_state_dict(weights)
    optimizer = model.optimizer(AdamW, lr=1e-2)
    if not load_first:
        for act in (lambda: model(**tokens()), optimizer.state_dict):
            with pytest.raises(StateError, match="weights are on 'meta'"):
                act()
        model.load_state_dict(weights)
    Loop(steps=2).run(OPT, model, optimizer)
    Loop(steps=2).run(OPT, reference, expected)
    assert same_weights(model, reference)


# -- state_dict of the optimizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "momentum", "plain sgd"])
def test_states_go_to_torch_and_come_back(kind: str) -> None:
    torch_kind, hyper = KINDS[kind]
    undisturbed, reference = plain(NET, torch_kind, **hyper)
    Loop(steps=6).run(NET, undisturbed, reference)
    model = placed(NET, "mixed")
    optimizer = model.optimizer(torch_kind, **hyper, fused=True)
    Loop(steps=2).run(NET, model, optimizer)

    theirs, torchs = plain(NET, torch_kind, **hyper)
    theirs.load_state_dict(model.state_dict())
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    Loop(steps=2).run(NET, theirs, torchs, start=2)

    again = placed(NET, "streamed, resident")
    last_one = again.optimizer(torch_kind, lr=7.0, **{k: v for k, v in hyper.items() if k == "momentum"})
    again.load_state_dict(theirs.state_dict())
    last_one.load_state_dict(torchs.state_dict())
    assert last_one.param_groups[0]["lr"] == hyper["lr"]
    assert same_moments(last_one, torchs)
    Loop(steps=2).run(NET, again, last_one, start=4)
    assert same_weights(again, undisturbed) and same_moments(last_one, reference)


def test_states_are_saved_without_copies_and_come_back_in_bf16() -> None:
    model, optimizer = ours("host", "bf16", in_backward=True)
    Loop(steps=2).run(NET, model, optimizer)
    state = model.session.machine.store.states[0]
    saved = optimizer.state_dict()["state"][0]["exp_avg"]
    assert saved.untyped_storage().data_ptr() == state.moments[0].untyped_storage().data_ptr()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    Loop(steps=2).run(NET, model, optimizer, start=2)
    file.seek(0)
    loaded = torch.load(file)
    resumed, again = ours("mixed", "bf16", in_backward=True)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    Loop(steps=2).run(NET, resumed, again, start=2)
    assert same_weights(model, resumed) and same_moments(optimizer, again)


def test_a_scheduler_goes_on_after_a_state_is_loaded() -> None:
    model, optimizer = ours()
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    rates = []
    for step in range(6):
        Loop(steps=1).run(NET, model, optimizer, start=step)
        scheduler.step()
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
    assert rates == [1, 0.5, 0.5, 0.25, 0.25, 0.125]


def spoiled(saved: dict[str, Any], how: str) -> dict[str, Any]:
    saved = copy.deepcopy(saved)
    if how == "kind":
        saved["state"][1] = {"momentum_buffer": torch.zeros(48)}
    elif how == "shape":
        saved["state"][5]["exp_avg_sq"] = torch.zeros(1)
    elif how == "no steps":
        del saved["state"][5]["step"]
    elif how == "steps":
        saved["state"][5]["step"] = torch.tensor(torch.nan)
    else:
        saved["param_groups"][0]["amsgrad"] = True
    saved["param_groups"][0]["lr"] = 5.0
    return saved


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kind", "the optimizer state of 0.0.bias has momentum_buffer, expected exp_avg, exp_avg_sq, step; it belongs"),
        ("shape", "has exp_avg_sq of shape (1,), expected"),
        (
            "no steps",
            "has exp_avg, exp_avg_sq, expected exp_avg, exp_avg_sq, step; it belongs to another optimizer, or is",
        ),
        ("steps", "has step=tensor(nan), expected the number of steps taken"),
        ("option", "amsgrad=True"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(how: str, message: str) -> None:
    model, optimizer = ours()
    Loop(steps=1).run(NET, model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(spoiled(before, how))
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    Loop(steps=1).run(NET, reference, expected)
    for each, optim in ((model, optimizer), (reference, expected)):
        optim.param_groups[0]["lr"] = 1e-3  # the groups are those that updates read
        Loop(steps=1).run(NET, each, optim, start=1)
    assert same_weights(model, reference) and same_moments(optimizer, expected)


# -- float16 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["mixed", "streamed"])
def test_float16_masters_are_float32_and_gradients_are_scaled(where: str) -> None:
    """The scale is a power of two, so that torch with the same gradients gets the same bits."""
    model, reference = placed(NET, where, "fp16"), NET.seeded()
    ours, theirs = model.optimizer(AdamW, lr=1e-2), AdamW(reference.parameters(), lr=1e-2, fused=True)
    for step in range(4):
        backward(model, step)
        assert ours.loss_scale == 2.0**16
        gradients = held_gradients(model)
        for name, parameter in reference.named_parameters():
            parameter.grad = gradients[name] / 2.0**16
        ours.step()
        theirs.step()
        assert last(ours) == pytest.approx(nn.utils.get_total_norm([g / 2.0**16 for g in gradients.values()]).item())
    assert same_weights(model, reference) and ours.skipped_steps == 0


def with_scale(optimizer: ChunkOptimizer, scale: float, steps: int = 0) -> None:
    saved = optimizer.state_dict()
    optimizer.load_state_dict({**saved, "loss_scale": {"scale": scale, "steps_since_overflow": steps}})


@pytest.mark.parametrize("declared", [{}, {"accumulate": 2}, {"max_grad_norm": 1.0}])
def test_a_float16_step_that_overflows_is_skipped(declared: dict[str, Any]) -> None:
    model = placed(NET, "mixed", "fp16")
    optimizer = model.optimizer(AdamW, lr=1e-2, **declared)
    with_scale(optimizer, 2.0**40)
    before = model.state_dict()
    for skipped in (1, 2):
        for _ in range(declared.get("accumulate", 1)):
            backward(model)
        optimizer.step()
        assert (optimizer.skipped_steps, optimizer.loss_scale) == (skipped, 2.0 ** (40 - skipped))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert optimizer.state_dict()["state"] == {}, "the moments are untouched"
    with_scale(optimizer, 2.0**10)
    Loop(steps=1, micro=declared.get("accumulate", 1)).run(NET, model, optimizer)
    assert optimizer.skipped_steps == 2 and not torch.equal(next(model.parameters()), before["0.0.weight"])


def test_the_scale_grows_after_the_step_that_it_counts() -> None:
    weights = []
    for steps in (0, GROWTH_STEPS - 1):
        model = placed(NET, "mixed", "fp16")
        optimizer = model.optimizer(SGD, lr=1e-2)
        with_scale(optimizer, 1024.0, steps)
        backward(model)
        optimizer.step()
        weights.append(model.state_dict())
    assert optimizer.loss_scale == 2048.0
    assert optimizer.state_dict()["loss_scale"] == {"scale": 2048.0, "steps_since_overflow": 0}
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# -- the host's worker -------------------------------------------------------------------------------------


def hosts() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "geminifx-host"}


@pytest.mark.parametrize("in_backward", [False, True])
def test_an_update_that_fails_on_the_host_ends_the_run(in_backward: bool) -> None:
    threads = hosts()
    model, optimizer = ours("host", in_backward=in_backward)
    Loop(steps=2).run(NET, model, optimizer)
    kernels = model.session.machine.store.updater.kernels
    update = kernels.update

    def failing(layout: Any, *rest: Any) -> None:
        if layout.index == 1:
            raise MemoryError("no room for a temporary")
        update(layout, *rest)

    kernels.update = failing
    with pytest.raises(StateError) as failed:
        Loop(steps=2).run(NET, model, optimizer)
    first = model.plan.layout.chunks[1].slots[0].name
    assert re.search(rf"the update of {first}, .* on the host failed \(MemoryError: no room for a", str(failed.value))
    assert "build the model again and load the last checkpoint" in str(failed.value)
    assert isinstance(failed.value.__cause__, MemoryError)
    kernels.update = update
    with torch.no_grad():
        for act in (lambda: NET.loss(model, NET.batch()), optimizer.step, model.state_dict, optimizer.state_dict):
            with pytest.raises(StateError, match="on the host failed"):
                act()
    with pytest.raises(StateError, match="on the host failed"):
        backward(model)
    assert hosts() <= threads, "the thread has ended, and holds nothing"


def test_the_thread_ends_with_the_model() -> None:
    threads = hosts()
    model, optimizer = ours("host")
    Loop(steps=1).run(NET, model, optimizer)
    (thread,) = hosts() - threads
    model.session.machine.store.finish()  # a job under way holds the model
    del model, optimizer
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


# -- a full host -------------------------------------------------------------------------------------------


def test_a_host_that_only_our_own_optimizer_fits_on() -> None:
    """12 + 2 bytes per parameter instead of 18 and a copy: compile says so, and training waits for the optimizer."""
    padded = sum(chunk.numel for chunk in placed(NET, "host", "bf16").plan.layout.chunks)
    options = {"precision": "bf16", "placement": "cpu", "host_budget": 14 * padded}
    model = compiled(NET, **options)
    assert any("only model.optimizer(...) fits" in note for note in model.plan.notes)
    saved = NET.seeded().state_dict()
    with pytest.raises(BudgetError, match="host memory"):
        backward(model)
    model.load_state_dict(saved)
    optimizer = model.optimizer(AdamW, lr=1e-2)
    assert model.session.hardware.tiers[1].used_bytes == model.plan.estimate.host_bytes == 14 * padded
    other = placed(NET, "host", "bf16")
    Loop().run(NET, other, other.optimizer(AdamW, lr=1e-2))
    Loop().run(NET, model, optimizer)
    assert same_weights(model, other)
    less = compiled(NET, **{**options, "host_budget": 14 * padded - 1})  # what is updated in the backward may fit
    with pytest.raises(BudgetError, match=r"host memory.*in_backward=True\) needs less"):
        less.optimizer(AdamW, lr=1e-2)
    with pytest.raises(BudgetError, match="host memory"):
        compiled(NET, **{**options, "host_budget": 6 * padded})


def test_a_host_that_sums_of_gradients_do_not_fit_on_keeps_the_model_as_it_was() -> None:
    padded = sum(chunk.numel for chunk in placed(NET, "host", "bf16").plan.layout.chunks)
    model = compiled(NET, precision="bf16", placement="cpu", host_budget=14 * padded)
    before, plan = NET.seeded(), model.plan
    with pytest.raises(BudgetError, match="host memory") as refused:
        model.optimizer(AdamW, accumulate=4)
    assert refused.value.smallest_bytes == 18 * padded
    assert model.plan == plan and not isinstance(next(model.parameters()), LazyParameter)
    optimizer = model.optimizer(AdamW)
    assert same_weights(model, before)
    backward(model)
    with pytest.raises(BudgetError, match=r"host tier is full: float32 gradients of chunk 0 \(accumulate= plans"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert not same_weights(model, before)


@pytest.mark.parametrize(("where", "tier", "per_weight"), [("device", 0, 12), ("host", 1, 14)])
def test_a_tier_that_fills_up_while_states_are_made_ends_the_run_and_loses_no_weights(
    where: str, tier: int, per_weight: int
) -> None:
    """As where another process took the memory that was planned: one chunk finds room, the next does not."""
    model = placed(NET, where, "bf16")
    model.session.hardware.tiers[tier].limit_bytes = per_weight * model.plan.layout.chunks[0].numel
    with pytest.raises(BudgetError, match="tier is full: the training state of chunk 1 needs"):
        model.optimizer(AdamW)
    assert same_weights(model, NET.seeded())
    with pytest.raises(BudgetError, match="tier is full"):
        backward(model)
    with pytest.raises(StateError, match="was called before"):
        model.optimizer(Adam)
