"""What is called past the compiled module's own forward: submodules, methods that call them, and generation."""

import copy
import inspect
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.state import streamed_weights
from geminifx.runtime.isa.errors import BudgetError, StateError
from interrupts import Failure, in_lines
from more_models import t5
from shared_captures import shared_captures
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from zoo import LLAMA, OPT, VOCAB, compiled, llama, opt, smallest_budget, tokens

pytestmark = pytest.mark.usefixtures("shared")

ROUTES = pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our optimizer"])
PLACEMENTS = pytest.mark.parametrize("placement", ["cpu", "cuda"])


class Pair(nn.Module):
    """An encoder and heads that a loop calls one by one, as contrastive and multi-task training do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.heads = nn.ModuleDict({"first": nn.Linear(16, 4), "second": nn.Linear(16, 2)})
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["first"](self.encoder(x))

    def training_step(self, x: Tensor) -> Tensor:
        self.seen += 1
        hidden = self.encoder(x)
        return self.heads["first"](hidden).square().sum() + self.heads["second"](hidden).sum()


def batch(step: int = 0) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def optimizer_of(model: nn.Module, ours: bool, kind: Any = SGD) -> Optimizer:
    return model.optimizer(kind, lr=0.05) if ours else kind(model.parameters(), lr=0.05)


def equal(model: nn.Module, plain: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


# -- parts -------------------------------------------------------------------------------------------------


@ROUTES
@PLACEMENTS
def test_submodules_that_are_called_alone_run_programs_of_their_own(placement: Any, ours: bool) -> None:
    plain, model = Pair(), geminifx.compile(Pair(), placement=placement, example_inputs=(batch(),))
    expected, optimizer = SGD(plain.parameters(), lr=0.05), optimizer_of(model, ours)
    for step in range(3):
        found = []
        for each, its in ((plain, expected), (model, optimizer)):
            hidden = each.encoder(batch(step))
            loss = each.heads["first"](hidden).square().sum()
            loss.backward()
            found.append((loss.detach(), hidden.detach(), each.heads["second"].weight.grad))
            its.step()
            its.zero_grad()
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
        assert found[0][2] is found[1][2] is None, "nothing read the second head"
    assert equal(model, plain)
    assert model.stats.steps == 6, "both parts are steps of the runtime"


@ROUTES
def test_methods_that_call_submodules_run_them_compiled(ours: bool) -> None:
    plain, model = Pair(), geminifx.compile(Pair(), example_inputs=(batch(),))
    expected, optimizer = SGD(plain.parameters(), lr=0.05), optimizer_of(model, ours)
    for step in range(3):
        for each, its in ((plain, expected), (model, optimizer)):
            each.training_step(batch(step)).backward()
            its.step()
            its.zero_grad()
    # The gradient of what both heads read is the sum of two, as in plain PyTorch.
    assert equal(model, plain)
    assert model.seen == model.source.seen == 3 and model.stats.steps == 9


def test_a_part_looks_like_its_module() -> None:
    model = geminifx.compile(Pair(), example_inputs=(batch(),))
    encoder, source = model.encoder, model.source
    assert isinstance(encoder, nn.Sequential) and encoder is model.encoder is model.get_submodule("encoder")
    assert isinstance(model.heads["first"], nn.Linear) and model.heads["first"].in_features == 16
    assert inspect.signature(encoder.forward) == inspect.signature(source.encoder.forward)
    assert [type(part._facade_source) for part in encoder] == [nn.Linear, nn.BatchNorm1d, nn.Tanh] and len(encoder) == 3
    assert list(encoder.state_dict()) == list(source.encoder.state_dict())
    encoder.eval()
    assert not source.encoder.training and not source.encoder[1].training and source.training
    encoder[1].momentum = 0.5
    assert source.encoder[1].momentum == 0.5
    assert torch.equal(encoder[0](batch()), source.encoder[0](batch()))
    with pytest.raises(StateError, match="cannot be copied"):
        copy.deepcopy(encoder)


WAYS = {
    "items": lambda model: dict(model.heads.items())["first"](model.encoder(batch())),
    "values": lambda model: [*model.heads.values()][1](model.encoder(batch())),
    "children": lambda model: next(iter(model.children()))(batch()),
    "named_children": lambda model: dict(model.named_children())["encoder"](batch()),
    "modules": lambda model: next(m for m in model.modules() if isinstance(m, nn.Linear))(batch()),
    "named_modules": lambda model: dict(model.named_modules())["encoder.0"](batch()),
    "of a part": lambda model: dict(model.encoder.named_modules())["0"](batch()),
    "a slice": lambda model: model.encoder[:2](batch()),
    "backwards": lambda model: list(reversed(model.encoder))[-1](batch()),
}


@pytest.mark.parametrize("way", WAYS)
def test_parts_run_compiled_however_they_are_found(way: str) -> None:
    plain, model = Pair(), geminifx.compile(Pair(), example_inputs=(batch(),), placement="cpu")
    for _ in range(2):
        results = [WAYS[way](each) for each in (plain, model)]
        assert torch.equal(*results)
        for result in results:
            result.square().sum().backward()
    assert model.stats.steps >= 2
    for (name, right), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (right.grad is None) == (found.grad is None), name
        assert right.grad is None or torch.equal(right.grad, found.grad)


def test_traversals_tell_of_the_source_and_of_the_same_parts_each_time() -> None:
    model, source = geminifx.compile(Pair(), example_inputs=(batch(),)), Pair()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in source.named_modules()]
    assert next(iter(model.modules())) is model
    held = list(model.modules())
    assert all(a is b for a, b in zip(held, model.modules(), strict=True)) and held[1] is model.encoder
    assert list(map(type, model.modules())) != list(map(type, source.modules()))
    assert [each.__class__ for each in model.encoder[1:]] == [nn.BatchNorm1d, nn.Tanh]
    assert list(model.heads.keys()) == ["first", "second"] and len(model.heads.values()) == 2
    model.apply(lambda module: setattr(module, "mark", 1))
    assert all(module.mark == 1 for module in model.source.modules())
    around = nn.ModuleDict({"inner": model})
    assert [n for n, _ in around.named_parameters()] == [f"inner.{n}" for n, _ in source.named_parameters()]


def test_a_part_that_was_taken_out_of_the_model_is_refused() -> None:
    model = geminifx.compile(Pair(), example_inputs=(batch(),))
    tanh = model.encoder[2]
    model.source.encoder[2] = nn.ReLU()
    with pytest.raises(StateError, match="Tanh was called, but it is no longer part of the compiled model"):
        tanh(batch())


@ROUTES
def test_a_part_is_evaluated_as_it_is_after_training(ours: bool) -> None:
    plain, model = opt(), compiled(OPT)
    model.load_state_dict(plain.state_dict())
    optimizer, expected = optimizer_of(model, ours, AdamW), AdamW(plain.parameters(), lr=0.05)
    for each, its in ((plain, expected), (model, optimizer)):
        each(**tokens()).loss.backward()
        its.step()
    model.eval(), plain.eval()
    with torch.no_grad():
        found, wanted = (each.get_decoder()(input_ids=tokens()["input_ids"])[0] for each in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert model.get_decoder() is model.model.decoder


class Stateful(nn.Module):
    """Names that the compiled model has too, and state that methods make."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.stats = nn.Linear(8, 8), 7
        self.inner = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.source(x)) * getattr(self, "scale", 1.0)

    def encode(self, x: Tensor) -> Tensor:
        return self.source(x)

    def rescale(self, scale: float) -> int:
        self.scale = scale
        self.history = [scale]
        return self.stats

    def parts(self, x: Tensor) -> Any:
        for layer in (self.source, self.inner):
            x = layer(x)
            yield x


def test_methods_see_the_models_names_and_what_they_set_stays() -> None:
    plain, model = Stateful(), geminifx.compile(Stateful(), example_inputs=(batch(),))
    assert torch.equal(model.encode(batch()), plain.encode(batch()))
    assert torch.equal(model(batch()), plain(batch()))
    assert model.rescale(3.0) == plain.rescale(3.0) == 7
    assert torch.equal(model(batch()), plain(batch())) and model.scale == 3.0 and model.source.history == [3.0]
    model.inner.mark = 5
    assert model.inner.mark == 5
    del model.inner.mark
    assert not hasattr(model.inner, "mark")
    assert all(map(torch.equal, model.parts(batch()), plain.parts(batch())))


def test_a_wrapper_of_the_whole_forward_may_be_taken_off() -> None:
    model = geminifx.compile(Stateful(), example_inputs=(batch(),))
    expected, forward = model(batch()), model.forward
    model.forward = lambda x: -forward(x)
    assert torch.equal(model(batch()), -expected)
    del model.forward
    assert torch.equal(model(batch()), expected)


def test_a_part_may_not_change_its_dtype_either() -> None:
    model = geminifx.compile(Pair(), example_inputs=(batch(),))
    assert model.encoder.to("cpu") is model.encoder
    with pytest.raises(StateError, match="change their dtype"):
        model.encoder.half()


def test_a_hook_on_a_part_is_its_modules() -> None:
    model = geminifx.compile(Pair(), example_inputs=(batch(),))
    before, handle = model(batch()), model.encoder.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.warns(UserWarning, match="has a forward hook"):
        assert not torch.equal(model(batch()), before)
    handle.remove()
    model.eval()
    assert torch.equal(model(batch()), model.source(batch()))


def test_several_parts_before_one_backward_that_updates_are_refused_and_told() -> None:
    model = geminifx.compile(Pair(), example_inputs=(batch(),), placement="cpu")
    optimizer = model.optimizer(SGD, lr=0.1, in_backward=True)
    with pytest.raises(StateError, match="several calls before one backward"):
        model.training_step(batch()).backward()
    with pytest.raises(StateError, match="load the last checkpoint"):
        optimizer.step()


def test_values_of_a_part_may_be_loaded() -> None:
    plain, model = Pair(), geminifx.compile(Pair(), example_inputs=(batch(),))
    model.optimizer(SGD, lr=0.1)
    nn.init.ones_(plain.encoder[0].weight)
    model.encoder.load_state_dict(plain.encoder.state_dict())
    assert equal(model, plain)


# -- generation --------------------------------------------------------------------------------------------

PROMPT = {"input_ids": tokens(length=5)["input_ids"] % (VOCAB - 8) + 4, "attention_mask": torch.ones(2, 5).long()}
GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 1}


@ROUTES
@PLACEMENTS
@pytest.mark.parametrize("build", [opt, llama, pytest.param(t5, marks=pytest.mark.slow)])
def test_what_is_generated_is_plain_pytorchs_and_captures_nothing(
    build: Any, placement: Any, ours: bool, captures: list[bool]
) -> None:
    torch.manual_seed(0)
    source = build()
    with shared_captures():
        plain, model = copy.deepcopy(source), geminifx.compile(source, placement=placement, example_inputs=tokens())
    optimizer, expected = optimizer_of(model, ours, AdamW), AdamW(plain.parameters(), lr=0.05)
    for seed in range(2):
        for each, its in ((plain, expected), (model, optimizer)):
            each.train()(**tokens(seed=seed)).loss.backward()
            its.step()
            its.zero_grad()
        captured, before = len(captures), copy.deepcopy(model.state_dict())
        found, wanted = (each.eval().generate(**PROMPT, **GREEDY) for each in (model, plain))
        assert torch.equal(found, wanted) and len(captures) == captured
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@ROUTES
def test_generation_computes_in_the_compute_dtype(ours: bool) -> None:
    torch.manual_seed(0)
    source = llama()
    plain = copy.deepcopy(source)
    for parameter in plain.parameters():  # and no buffers, such as those of rotary positions
        parameter.data = parameter.data.to(torch.bfloat16)
    with shared_captures():
        model = geminifx.compile(source, precision="bf16", example_inputs=tokens())
    optimizer_of(model, ours)
    scores = {"output_scores": True, "return_dict_in_generate": True}
    found, wanted = (each.eval().generate(**PROMPT, **GREEDY, **scores) for each in (model, plain))
    assert found.scores[0].dtype == wanted.scores[0].dtype and torch.equal(found.sequences, wanted.sequences)
    assert all(map(torch.equal, found.scores, wanted.scores))


def test_autocast_around_generation_changes_nothing() -> None:
    model = compiled(LLAMA).eval()
    scores = {"output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(**PROMPT, **GREEDY, **scores).scores
    with torch.autocast("cpu", torch.bfloat16):
        found = model.generate(**PROMPT, **GREEDY, **scores).scores
    assert all(map(torch.equal, found, expected))


def test_a_generation_that_is_interrupted_anywhere_leaves_the_parameters() -> None:
    model, failure = compiled(OPT).eval(), Failure()
    options = {**PROMPT, **GREEDY, "max_new_tokens": 1}
    expected, own = model.generate(**options), dict(model.source.named_parameters())

    def generate(at: int | None = None) -> Tensor:
        with in_lines({streamed_weights.__file__}, failure.pass_by), failure.armed(at):
            return model.generate(**options)

    generate()
    for at in {*range(0, failure.count, 7), *range(failure.count - 60, failure.count)}:  # all of how it ends
        with pytest.raises(KeyboardInterrupt):
            generate(at)
        assert all(parameter is own[name] for name, parameter in model.source.named_parameters())
    assert torch.equal(model.generate(**options), expected)


@ROUTES
def test_generation_keeps_to_the_budget_and_training_goes_on(ours: bool) -> None:
    budget = smallest_budget(OPT)
    plain, model = OPT.build(), compiled(OPT, device_budget=budget)
    plain.load_state_dict(model.state_dict())
    optimizer, expected = optimizer_of(model, ours), SGD(plain.parameters(), lr=0.05)
    model.eval().generate(**PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=1)
    device, _ = model.session.hardware.tiers
    assert 0 < device.peak_bytes <= budget
    used = device.used_bytes
    wide = {name: value.repeat(400, 1) for name, value in PROMPT.items()}
    with pytest.raises(BudgetError, match="the device tier is full"):
        model.generate(**wide, **GREEDY)
    assert device.used_bytes == used and device.peak_bytes <= budget
    for each, its in ((plain, expected), (model, optimizer)):
        each.train()(**tokens()).loss.backward()
        its.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


def test_generation_of_divided_parameters_is_refused() -> None:
    model = compiled(LLAMA, parallel={"tensor": "1d:2"})
    with pytest.raises(StateError, match="torchrun --nproc-per-node 2"):
        model.generate(**PROMPT, **GREEDY)
