"""Gradual unfreezing: parameters that are trained later than the first step, beside plain PyTorch."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import BudgetError, CheckpointError, StateError
from geminifx.runtime.memory.hardware import Hardware
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Muon

pytestmark = pytest.mark.usefixtures("shared")

WIDTH, DEPTH, CLASSES = 64, 6, 5
HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}


class Tower(nn.Module):
    """Frozen blocks under a trained head; `unfreeze` trains one block more, from the top."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH).to(dtype) for _ in range(DEPTH))
        self.blocks.requires_grad_(False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x.to(block.weight.dtype)).to(x.dtype))
        return F.cross_entropy(self.head(x).float(), labels)

    def unfreeze(self, number: int) -> list[nn.Parameter]:
        block = self.blocks[DEPTH - 1 - number].requires_grad_(True)
        return list(block.parameters())


def batch(step: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(step)
    return {"x": torch.randn(8, WIDTH, generator=random), "labels": torch.randint(CLASSES, (8,), generator=random)}


Trained = list[tuple[Tensor, list[Tensor | None]]]


def gradually(model: Any, source: Tower, optimizer: torch.optim.Optimizer, *, adds: bool, gradients: bool) -> Trained:
    """Seven steps of the head alone, with one block more, with three, and with the first of them frozen again."""
    seen: Trained = []
    for step in range(7):
        thawed = [p for number in {2: (0,), 4: (1, 2)}.get(step, ()) for p in source.unfreeze(number)]
        if thawed and adds:
            optimizer.add_param_group({"params": thawed})
        if step == 6:
            source.blocks[-1].requires_grad_(False)
        loss = model(**batch(step))
        if isinstance(model, geminifx.CompiledModule) and not gradients:  # whose sums in float32 are not planned
            assert model.stats.host_peak_bytes <= model.session.planned_host_bytes()
        loss.backward()
        grads = [None if p.grad is None else p.grad.detach().clone() for p in source.parameters()] if gradients else []
        seen.append((loss.detach(), grads))
        optimizer.step()
        model.zero_grad()  # also of what is in no group yet
    return seen


def alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def assert_as_plain(ours: Trained, plain: Trained) -> None:
    for (loss, gradients), (expected, others) in zip(ours, plain, strict=True):
        assert torch.equal(loss, expected)
        assert not gradients or all(map(alike, gradients, others))


Make = Callable[[geminifx.CompiledModule, list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "torch's": lambda model, parameters: AdamW(parameters, **HYPER),
    "ours": lambda model, parameters: model.optimizer(AdamW, parameters, lr=1e-2, weight_decay=0.1),
    "ours, in the backward": lambda model, parameters: model.optimizer(
        AdamW, parameters, lr=1e-2, weight_decay=0.1, in_backward=True
    ),
}


@pytest.mark.parametrize("adds", [True, False], ids=["groups are added", "one group has all"])
@pytest.mark.parametrize("placement, budget", [("cpu", None), ("cuda", None), ("auto", "250KB"), ("auto", None)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_blocks_that_are_thawed_one_after_the_other(kind: str, placement: str, budget: str | None, adds: bool) -> None:
    source, plain = Tower(), Tower()
    model = geminifx.compile(source, device="cpu", placement=placement, device_budget=budget)
    given = (source.head if adds else source).parameters()
    optimizer = OPTIMIZERS[kind](model, list(given))
    expected = AdamW((plain.head if adds else plain).parameters(), **HYPER)
    gradients = "backward" not in kind
    ours = gradually(model, source, optimizer, adds=adds, gradients=gradients)
    assert_as_plain(ours, gradually(plain, plain, expected, adds=adds, gradients=gradients))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    trained = [chunk for chunk in model.plan.layout.chunks if chunk.trainable]
    assert sum(chunk.numel for chunk in trained) < sum(chunk.numel for chunk in model.plan.layout.chunks)
    if budget is not None:
        assert model.stats.device_peak_bytes <= 250_000


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "precision, dtype", [("bf16", torch.bfloat16), ("bf16", torch.float32), ("fp16", torch.float32)]
)
def test_thawed_weights_of_16_bits_are_trained_as_if_they_had_been_trainable_from_the_start(
    kind: str, precision: str, dtype: torch.dtype
) -> None:
    """Their masters are made of the weights, and of nothing less where these were float32. Weights that are trained
    from the start and in no group of the optimizer stay as they are, and so have a master from the start."""
    if kind == "ours, in the backward" and precision == "fp16":
        pytest.skip("a loss scale and updates in the backward exclude one another")
    seen, states = list[Trained](), list[dict[str, Tensor]]()
    for thaws in (True, False):
        source = Tower(dtype)
        if not thaws:
            source.requires_grad_(True)
        model = geminifx.compile(source, device="cpu", placement="cpu", precision=precision)
        optimizer = OPTIMIZERS[kind](model, list(source.head.parameters()))
        seen.append(gradually(model, source, optimizer, adds=True, gradients=False))
        states.append(model.state_dict())
        assert all(chunk.master_dtype == torch.float32 for chunk in model.plan.layout.chunks if chunk.trainable)
    assert_as_plain(*seen)
    for (name, value), other in zip(states[0].items(), states[1].values(), strict=True):
        assert torch.equal(value.float(), other.float()), name


def test_an_evaluation_before_the_next_step_changes_nothing() -> None:
    source = Tower()
    model = geminifx.compile(source, device="cpu")
    model.optimizer(AdamW, lr=1e-2)
    model(**batch(0)).backward()
    layout = model.plan.layout
    source.unfreeze(0)
    with torch.no_grad():
        loss = model(**batch(1))
    assert model.plan.layout == layout and torch.isfinite(loss)


def test_between_the_backwards_of_a_step_nothing_is_thawed() -> None:
    source, plain = Tower(), Tower()
    model = geminifx.compile(source, device="cpu")
    optimizer, expected = model.optimizer(AdamW, lr=1e-2, weight_decay=0.1), AdamW(plain.head.parameters(), **HYPER)
    for step in range(2):
        for each in (model, plain):
            each(**batch(step)).backward()
        if step == 0:
            source.unfreeze(0)
            with pytest.raises(StateError, match="between the backwards of one step"):
                model(**batch(1))
            source.blocks.requires_grad_(False)
    optimizer.step()
    expected.step()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("own", [True, False], ids=["ours", "torch's"])
def test_where_a_thawed_block_does_not_fit_nothing_has_changed(own: bool) -> None:
    make = OPTIMIZERS["ours" if own else "torch's"]
    free = geminifx.compile(Tower(), device="cpu", placement="cuda", example_inputs=batch(0))
    make(free, list(free.parameters()))
    source, plain = Tower(), Tower()
    budget = free.plan.peak_bytes + 1000
    model = geminifx.compile(source, device="cpu", placement="cuda", device_budget=budget)
    optimizer = make(model, list(source.parameters()))
    expected = AdamW(plain.parameters(), **HYPER)
    for step in range(4):
        if step == 1:
            source.unfreeze(0)
            with pytest.raises(BudgetError, match=f"{budget:,}"):
                model(**batch(step))
            source.blocks.requires_grad_(False)
        losses = [each(**batch(step)) for each in (model, plain)]
        for loss, each in zip(losses, (optimizer, expected), strict=True):
            loss.backward()
            each.step()
            each.zero_grad()
        assert torch.equal(*losses)


def test_a_torch_optimizers_masters_stay_and_thawed_ones_go_where_there_is_room() -> None:
    source = Tower()
    model = geminifx.compile(source, device="cpu", device_budget="190KB")
    optimizer = AdamW(source.parameters(), **HYPER)
    for step in range(4):
        if step == 1:
            held = {name: parameter.data_ptr() for name, parameter in source.head.named_parameters()}
            was = [home.on_device for chunk, home in model.plan.placed(model.plan.homes)]
            for number in range(DEPTH):
                source.unfreeze(number)
        model(**batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert held == {name: parameter.data_ptr() for name, parameter in source.head.named_parameters()}
    now = [home.on_device for chunk, home in model.plan.placed(model.plan.homes)]
    assert any(was) and was != now and model.stats.device_peak_bytes <= 190_000


def test_a_torch_optimizers_masters_stay_for_another_batch_between_a_thaw_and_its_step() -> None:
    source = Tower()
    model = geminifx.compile(source, device="cpu", device_budget="190KB")
    optimizer = AdamW(source.parameters(), **HYPER)
    model(**batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    source.unfreeze(0)
    model.prepare(**batch(1))
    held = [parameter.data_ptr() for parameter in source.head.parameters()]
    plans = [model.plan.homes]
    for size in (3, 5):
        model.prepare(**{name: value[:size] for name, value in batch(2).items()})
        plans.append(model.plan.homes)
    source.unfreeze(1)
    model(**batch(3)).backward()
    optimizer.step()
    assert held == [parameter.data_ptr() for parameter in source.head.parameters()]
    assert len({tuple(home.where for home in homes) for homes in plans}) == 1


def test_optimizers_of_whole_parameters_take_thawed_ones_of_one_rule() -> None:
    def made(source: nn.Module, model: Any, kind: Any) -> Any:
        matrices = [block.weight for block in source.blocks]
        others = {"params": [*(block.bias for block in source.blocks), *source.head.parameters()], "lr": 1e-2}
        return kind([{"params": matrices}, others | {"kind": SGD}])

    source = Tower()
    model = geminifx.compile(source, device="cpu")
    optimizer = made(source, model, lambda groups: model.optimizer(Muon, groups, lr=1e-2))
    model(**batch(0)).backward()
    optimizer.step()
    source.unfreeze(0)
    with pytest.raises(StateError, match=r"updates by different rules \(elements, matrices\); save"):
        model(**batch(1))


def test_a_thawed_parameter_refuses_gradients_from_outside_of_the_model() -> None:
    source = Tower(torch.bfloat16)
    model = geminifx.compile(source, device="cpu", precision="bf16")
    optimizer = model.optimizer(AdamW, lr=1e-2)
    for step in range(2):
        model(**batch(step)).backward()
        optimizer.step()
        thawed = source.unfreeze(0)
    model(**batch(2)).backward()
    assert thawed[0].dtype == torch.float32
    with pytest.raises(StateError, match="a gradient reached a parameter from outside the compiled model"):
        thawed[0].square().sum().backward()


@pytest.mark.parametrize("saved_as", ["a checkpoint", "a state_dict"])
def test_moments_are_not_loaded_into_what_is_planned_as_frozen(saved_as: str, tmp_path: Path) -> None:
    source = Tower()
    model = geminifx.compile(source, device="cpu")
    optimizer = model.optimizer(AdamW, source.parameters(), lr=1e-2)
    source.unfreeze(0)
    for step in range(2):
        model(**batch(step)).backward()
        optimizer.step()
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    state, weights = deepcopy(optimizer.state_dict()), model.state_dict()

    def load(model: geminifx.CompiledModule, optimizer: Any) -> None:
        if saved_as == "a checkpoint":
            geminifx.load_checkpoint(model, optimizer, tmp_path / "saved")
        else:
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)

    again = Tower()
    resumed = geminifx.compile(again, device="cpu")
    other = resumed.optimizer(AdamW, again.parameters(), lr=1e-2)
    resumed(**batch(9)).backward()
    other.step()
    for thaws in (False, True):
        if thaws:
            again.unfreeze(0)
        with pytest.raises(ValueError if saved_as == "a state_dict" else CheckpointError, match="there is no memory"):
            load(resumed, other)
    resumed.prepare(**batch(9))
    load(resumed, other)
    for each, optim in ((model, optimizer), (resumed, other)):
        each(**batch(2)).backward()
        optim.step()
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))
    moments = [tensor for entry in optimizer.state_dict()["state"].values() for tensor in entry.values()]
    assert all(map(torch.equal, moments, (t for e in other.state_dict()["state"].values() for t in e.values())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_thaw_for_which_there_is_no_memory_after_all_is_undone(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever allocating fails, training goes on as before, and the blocks may be thawed later."""
    source, reference = Tower(dtype), Tower(dtype)
    model, plain = (geminifx.compile(each, device="cpu", precision="bf16") for each in (source, reference))
    optimizer, expected = (OPTIMIZERS[kind](each, list(each.parameters())) for each in (model, plain))
    zeros, left = Hardware.zeros, [0]

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise BudgetError("there is no memory after all")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(Hardware, "zeros", failing)
    failed = 0
    for step in range(12):
        if step in range(1, 8):
            source.unfreeze(0), source.unfreeze(2)
            left[0] = step
            try:
                model.prepare(**batch(step))
            except BudgetError:
                failed += 1
            left[0] = 0
            if step < 7:
                source.blocks.requires_grad_(False)
        if step == 7:
            reference.unfreeze(0), reference.unfreeze(2)
        losses = [each(**batch(step)) for each in (model, plain)]
        for loss, optim in zip(losses, (optimizer, expected), strict=True):
            loss.backward()
            optim.step()
            optim.zero_grad()
        assert torch.equal(*losses), step
    allocates = kind != "torch's" or dtype == torch.bfloat16  # masters of float32 stay where the weights are
    assert failed >= 2 * allocates
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


def test_gradients_that_were_assigned_to_frozen_parameters_stay() -> None:
    source, plain = Tower(), Tower()
    model = geminifx.compile(source, device="cpu")
    optimizer = model.optimizer(AdamW, source.parameters(), lr=1e-2, weight_decay=0.1)
    expected = AdamW(plain.parameters(), **HYPER)
    for each, trained, optim in ((model, source, optimizer), (plain, plain, expected)):
        each(**batch(0)).backward()
        optim.step()
        optim.zero_grad()
        trained.unfreeze(0)
        for parameter in trained.blocks[-1].parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        each(**batch(1)).backward()
        optim.step()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
