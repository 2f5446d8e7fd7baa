"""Gradients are plain PyTorch's where a loop asks for something unusual, or there is an error that tells."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa.errors import StateError
from more_models import encoder_decoder
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import SGD, AdamW
from zoo import VOCAB

PLACEMENTS = pytest.mark.parametrize("placement", ["cpu", "cuda"])
DECAY = {"lr": 1e-2, "weight_decay": 0.5}
"""So much that a parameter which is updated by a gradient of zeros moves for all to see."""


def batch(step: int = 0, rows: int = 4) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(step))


def same(model: nn.Module, other: nn.Module) -> bool:
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def same_gradients(model: nn.Module, other: nn.Module) -> bool:
    """Also in which parameters have none."""
    pairs = [(found, gradients(other)[name]) for name, found in gradients(model).items()]
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


class Heads(nn.Module):
    """Two heads on a trunk; a third part takes an input of its own."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.first, self.second, self.apart = nn.Linear(16, 4), nn.Linear(16, 4), nn.Linear(8, 4)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        h = self.trunk(x)
        return self.first(h), self.second(h), self.apart(x if y is None else y)


def heads(tied: bool = False) -> Heads:
    torch.manual_seed(0)
    return Heads(tied)


def loss_of(outputs: Sequence[Tensor], used: Sequence[int]) -> Tensor:
    return torch.stack([outputs[i].square().mean() for i in used]).sum()


TURNS: list[tuple[int, ...]] = [(0,), (1,), (0, 2), (2,), (0, 1, 2), (1,), (1, 0)]
"""The outputs that the loss of each step uses."""


# -- derivatives of derivatives ----------------------------------------------------------------------------


def critic() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def test_a_gradient_that_is_to_have_a_gradient_is_refused() -> None:
    """As gradient penalties ask for: it would pass for a constant."""
    model, x = geminifx.compile(critic()), batch().requires_grad_()
    with pytest.raises(StateError, match="a second derivative was requested"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert all(p.grad is None for p in model.parameters())


def test_a_backward_that_is_to_have_a_gradient_is_refused() -> None:
    model, x = geminifx.compile(critic()), batch().requires_grad_()
    loss = model(x).square().sum()
    with pytest.raises(StateError, match="create_graph=True"):
        loss.backward(create_graph=True)
    assert all(p.grad is None for p in model.parameters()) and x.grad is None


def test_a_derivative_in_forward_mode_is_refused_and_what_needs_none_is_fine() -> None:
    model, x = geminifx.compile(nn.Linear(4, 3)), torch.ones(2, 4)
    with forward_ad.dual_level():
        assert torch.equal(model(x), model.eval()(x))
        with pytest.raises(StateError, match="dual tensor, but a program computes no derivatives in forward mode"):
            model(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize(
    "transform",
    [
        lambda model, x: torch.func.grad(lambda y: model(y).sum())(x),
        lambda model, x: torch.vmap(model)(x[None]),
        lambda model, x: torch.func.jvp(model, (x,), (x,)),
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_a_call_within_a_transform_is_refused(transform: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = geminifx.compile(nn.Linear(4, 3))
    with pytest.raises(StateError, match=r"within a transform of torch\.func"):
        transform(model, torch.ones(2, 4))


def test_without_a_graph_of_it_a_gradient_is_plain_pytorchs() -> None:
    plain, model = critic(), geminifx.compile(critic())
    found, expected = (
        torch.autograd.grad(each(x).square().sum(), x)[0]
        for each, x in ((model, batch().requires_grad_()), (plain, batch().requires_grad_()))
    )
    assert torch.equal(found, expected) and not found.requires_grad
    assert all(p.grad is None for p in model.parameters())


ASKING = {
    "grad": lambda loss, parameters: torch.autograd.grad(loss, parameters),
    "grad, unused allowed": lambda loss, parameters: torch.autograd.grad(loss, parameters, allow_unused=True),
    "backward": lambda loss, parameters: loss.backward(inputs=parameters),
    "of a sum": lambda loss, parameters: (loss + parameters[0].sum()).backward(inputs=parameters),
}


@pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our optimizer"])
@pytest.mark.parametrize("way", ASKING)
def test_gradients_of_chosen_parameters_are_refused_with_the_way_to_have_them(way: str, ours: bool) -> None:
    plain, model = critic(), geminifx.compile(critic(), example_inputs=(batch(),))
    if ours:
        model.optimizer(SGD, lr=0.1)
    (name, _), *_ = plain.named_parameters()
    loss = model(batch()).square().sum()
    with pytest.raises(StateError, match=re.escape(f"called for parameter {name}, but")):
        ASKING[way](loss, list(model.parameters())[:1])
    loss.backward()
    plain(batch()).square().sum().backward()
    for found, right in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, right.grad)


def test_gradients_of_parameters_by_what_is_computed_outside_are_autograds() -> None:
    model = geminifx.compile(critic(), example_inputs=(batch(),))
    weight = next(model.parameters())
    (slope,) = torch.autograd.grad(weight.square().sum(), weight)
    assert torch.equal(slope, 2 * weight)
    other = nn.Linear(8, 1)
    x = batch().requires_grad_()
    model(x).sum().backward(inputs=[x])
    (other(batch()).sum() + model(batch()).sum()).backward(inputs=list(other.parameters()))
    assert other.weight.grad is not None and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("declared", [None, {}, {"in_backward": True}, {"max_grad_norm": 0.1}])
def test_a_gradient_of_inputs_alone_leaves_those_of_parameters_alone(declared: dict[str, Any] | None) -> None:
    """As adversarial training asks for it, in front of each step."""
    plain, model = critic(), geminifx.compile(critic(), example_inputs=(batch(),))
    expected = SGD(plain.parameters(), lr=0.1)
    ours = SGD(model.parameters(), lr=0.1) if declared is None else model.optimizer(SGD, lr=0.1, **declared)
    for step in range(3):
        for each, optimizer in ((plain, expected), (model, ours)):
            x = batch(step).requires_grad_()
            (slope,) = torch.autograd.grad(each(x).square().sum(), x)
            each(x.detach() + 0.1 * slope.sign()).square().sum().backward()
            each(x).square().sum().backward(inputs=[x])
            if each is plain and declared == {"max_grad_norm": 0.1}:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for found, parameter in zip(model.state_dict().values(), plain.parameters(), strict=True):
        # Norms are sums in another order.
        torch.testing.assert_close(
            found, parameter.detach(), rtol=0, atol=1e-6 if declared == {"max_grad_norm": 0.1} else 0
        )


@pytest.mark.parametrize("ours", [False, True])
def test_two_calls_may_come_before_one_backward_of_both(ours: bool) -> None:
    """As contrastive losses do; batch norms are written by the second before the first one's backward."""

    def normed() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))

    plain, model = normed(), geminifx.compile(normed(), example_inputs=(batch(),))
    expected = SGD(plain.parameters(), lr=0.1)
    optimizer = model.optimizer(SGD, lr=0.1) if ours else SGD(model.parameters(), lr=0.1)
    for step in range(3):
        for each in (plain, model):
            (each(batch(step)) - each(batch(step + 1))).square().sum().backward()
        for each in (expected, optimizer):
            each.step()
            each.zero_grad()
    for (name, found), value in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6, msg=name)  # two gradients are added in turn


def test_a_penalty_on_what_stands_before_the_model_works() -> None:
    """The graph may be asked for of what is not compiled."""
    plain, model = critic(), geminifx.compile(critic())
    for each in (model, plain):
        x = batch().requires_grad_()
        (slope,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        each(slope).sum().backward()
        assert x.grad is not None
    assert same_gradients(model, plain)


# -- outputs that the loss does not use --------------------------------------------------------------------


@PLACEMENTS
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_what_only_unused_outputs_reach_has_no_gradient(placement: Any, tied: bool) -> None:
    plain, model = heads(tied), geminifx.compile(heads(tied), placement=placement)
    optimizers = [AdamW(each.parameters(), **DECAY, fused=True) for each in (model, plain)]
    for step, used in enumerate(TURNS):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(each(batch(step)), used).backward()
        assert same_gradients(model, plain)
        for optimizer in optimizers:
            optimizer.step()
    assert same(model, plain)
    assert tied == (model.first.weight is model.second.weight)


@PLACEMENTS
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["default", "in_backward"])
def test_our_own_optimizer_leaves_alone_what_has_no_gradient(placement: Any, tied: bool, in_backward: bool) -> None:
    plain = heads(tied)
    model = geminifx.compile(heads(tied), placement=placement, example_inputs=(batch(),))
    optimizer = model.optimizer(AdamW, **DECAY, in_backward=in_backward)
    expected = AdamW(plain.parameters(), **DECAY, fused=True)
    for step, used in enumerate(TURNS):
        for each, optim in ((model, optimizer), (plain, expected)):
            optim.zero_grad()
            loss_of(each(batch(step)), used).backward()
        assert in_backward or same_gradients(model, plain)
        optimizer.step(), expected.step()
        assert same(model, plain), f"after step {step}, whose loss uses {used}"


@pytest.mark.parametrize("in_backward", [False, True], ids=["default", "in_backward"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_heads_that_alternate_within_one_step(in_backward: bool, tied: bool) -> None:
    """A chunk may be complete in its last backward without having a part in it."""
    plain, model = heads(tied), geminifx.compile(heads(tied), example_inputs=(batch(),))
    optimizer = model.optimizer(AdamW, **DECAY, in_backward=in_backward, accumulate=2)
    expected = AdamW(plain.parameters(), **DECAY, fused=True)
    for step, pair in enumerate([((0,), (1,)), ((1,), (0,)), ((0,), (0,)), ((1, 2), (0,)), ((2,), (1,)), ((1,), (1,))]):
        for each, optim in ((model, optimizer), (plain, expected)):
            for part, used in enumerate(pair):
                loss_of(each(batch(10 * step + part)), used).backward()
            optim.step()
            optim.zero_grad()
        assert same(model, plain), f"after step {step}, whose losses use {pair}"


def test_sums_over_alternating_heads_by_torchs_optimizer() -> None:
    plain, model = heads(), geminifx.compile(heads())
    optimizers = [AdamW(each.parameters(), **DECAY, fused=True) for each in (model, plain)]
    for step, used in enumerate(TURNS):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            loss_of(each(batch(step)), used).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert same_gradients(model, plain)
    assert same(model, plain)


def test_the_norm_that_is_clipped_counts_the_used_heads_alone() -> None:
    plain, model = heads(), geminifx.compile(heads(), example_inputs=(batch(),))
    optimizer = model.optimizer(SGD, lr=0.1, max_grad_norm=1e-2)
    for step, used in enumerate(TURNS):
        for each in (model, plain):
            each.zero_grad()
            loss_of(each(batch(step)), used).backward()
        norm = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        optimizer.step()
        # The squares are summed chunk by chunk and not tensor by tensor: in another order.
        assert optimizer.grad_norm is not None and torch.allclose(optimizer.grad_norm, norm, rtol=1e-5, atol=0)
        plain.load_state_dict(model.state_dict())


def test_moments_are_made_when_a_gradient_comes_first() -> None:
    """And count their steps from there, as torch's do."""
    plain, model = heads(), geminifx.compile(heads(), example_inputs=(batch(),))
    optimizer, expected = model.optimizer(AdamW, **DECAY), AdamW(plain.parameters(), **DECAY, fused=True)
    for each, optim in ((model, optimizer), (plain, expected)):
        loss_of(each(batch()), (0,)).backward()
        optim.step()
    found = optimizer.state_dict()["state"]
    assert found.keys() == expected.state_dict()["state"].keys()
    assert {name for name, p in plain.named_parameters() if p in expected.state} == {
        "trunk.0.weight", "trunk.0.bias", "first.weight", "first.bias",
    }  # fmt: skip


def test_an_input_that_only_an_unused_output_reaches_has_no_gradient() -> None:
    plain, model = heads(), geminifx.compile(heads())
    for used in TURNS:
        pairs = [(batch(1).requires_grad_(), batch(2).requires_grad_()) for _ in range(2)]
        for each, (x, y) in zip((model, plain), pairs, strict=True):
            loss_of(each(x, y), used).backward()
        for found, expected in zip(*pairs, strict=True):
            assert (found.grad is None) == (expected.grad is None)
            assert found.grad is None or torch.equal(found.grad, expected.grad)


def test_an_input_without_a_gradient_is_told_by_autograd_grad() -> None:
    model, x, y = geminifx.compile(heads()), batch(1).requires_grad_(), batch(2).requires_grad_()
    first, *_ = model(x, y)
    with pytest.raises(RuntimeError, match="allow_unused=True"):
        torch.autograd.grad(first.sum(), (x, y))
    first, *_ = model(x, y)
    found = torch.autograd.grad(first.sum(), (x, y), allow_unused=True)
    assert found[0] is not None and found[1] is None


def test_an_output_times_zero_is_used() -> None:
    """Its gradient is zero, and not None, in plain PyTorch too."""
    plain, model = heads(), geminifx.compile(heads())
    for each in (model, plain):
        first, second, _ = each(batch())
        (first.sum() + 0 * second.sum()).backward()
    assert same_gradients(model, plain)
    assert model.second.weight.grad is not None and not model.second.weight.grad.any()
    assert model.apart.weight.grad is None


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_unused_outputs_of_blocks_that_are_recomputed(recompute: Any) -> None:
    class Exits(nn.Module):
        """An exit behind every block."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            exits = []
            for block in self.blocks:
                x = x + block(x)
                exits.append(x)
            return exits

    torch.manual_seed(0)
    plain = Exits()
    model = geminifx.compile(copy.deepcopy(plain), recompute=recompute)
    for used in ((0,), (1,), (0, 1), (2,)):
        for each in (model, plain):
            each.zero_grad()
            loss_of(each(batch()), used).backward()
        assert same_gradients(model, plain)


# -- the gradients of our own optimizer --------------------------------------------------------------------


GRADIENT_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "grad.data = zeros": lambda p: p.grad.__setattr__("data", torch.zeros_like(p.grad)),
    "grad.data = half": lambda p: p.grad.__setattr__("data", p.grad * 0.5),
    "grad.data.mul_": lambda p: p.grad.data.mul_(0.25),
    "grad.data[0] = 0": lambda p: p.grad.data[0].zero_(),
    "grad.mul_": lambda p: p.grad.mul_(0.25),
    "grad = ...": lambda p: p.__setattr__("grad", p.grad.sign()),
    "grad = None": lambda p: p.__setattr__("grad", None),
}


@pytest.mark.parametrize("write", GRADIENT_WRITES)
def test_gradients_may_be_written_in_every_way(write: str) -> None:
    plain, model = critic(), geminifx.compile(critic(), example_inputs=(batch(),))
    optimizer, expected = model.optimizer(AdamW, **DECAY), AdamW(plain.parameters(), **DECAY, fused=True)
    for step in range(3):
        for each, optim in ((model, optimizer), (plain, expected)):
            optim.zero_grad()
            each(batch(step)).square().sum().backward()
            for p in list(each.parameters())[:2]:
                GRADIENT_WRITES[write](p)
        assert same_gradients(model, plain)
        optimizer.step(), expected.step()
        assert same(model, plain)


@pytest.mark.parametrize("zero_grad", ["the optimizer's", "the model's"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["default", "in_backward"])
def test_gradients_of_zeros_that_come_again_are_as_none(zero_grad: str, in_backward: bool) -> None:
    plain, model = critic(), geminifx.compile(critic(), example_inputs=(batch(),))
    optimizer = model.optimizer(AdamW, **DECAY, in_backward=in_backward)
    expected = AdamW(plain.parameters(), **DECAY, fused=True)
    for step in range(3):
        for each, optim in ((model, optimizer), (plain, expected)):
            each(batch(step)).square().sum().backward()
            optim.step()
            (optim if zero_grad == "the optimizer's" else each).zero_grad(set_to_none=False)
        assert same(model, plain)


def test_a_gradient_of_zeros_that_stays_one_is_refused() -> None:
    """Torch's AdamW decays by it, and goes on by the moments."""
    plain, model = heads(), geminifx.compile(heads(), example_inputs=(batch(),))
    optimizer, expected = model.optimizer(AdamW, **DECAY), AdamW(plain.parameters(), **DECAY, fused=True)
    for each, optim in ((model, optimizer), (plain, expected)):
        loss_of(each(batch()), (0, 1, 2)).backward()
        optim.step()
    before = model.state_dict()
    optimizer.zero_grad(set_to_none=False)
    loss_of(model(batch(1)), (0,)).backward()
    with pytest.raises(StateError, match=r"set the gradient of (second|apart)\.\w+ to zero, and no backward has"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing was updated"
    # What the message advises heals it: the step is plain's with zero_grad().
    for each, optim in ((model, optimizer), (plain, expected)):
        optim.zero_grad()
        loss_of(each(batch(1)), (0,)).backward()
        optim.step()
    assert same(model, plain)


def test_a_gradient_of_zeros_is_refused_in_later_steps_too() -> None:
    model = geminifx.compile(heads(), example_inputs=(batch(),))
    optimizer = model.optimizer(AdamW, **DECAY)
    loss_of(model(batch()), (0, 1, 2)).backward()
    optimizer.step()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model(batch()), (0, 1)).backward()
        with pytest.raises(StateError, match=r"gradient of apart\.\w+ to zero"):
            optimizer.step()
    loss_of(model(batch()), (2,)).backward()
    optimizer.step()  # now it has come


# -- outputs that are changed in place ---------------------------------------------------------------------


class Twice(nn.Module):
    """Two outputs of one computation, which are two tensors in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(x)


@pytest.mark.parametrize("grad", [True, False])
def test_equal_outputs_do_not_share_memory(grad: bool) -> None:
    torch.manual_seed(0)
    plain = Twice()
    model = geminifx.compile(copy.deepcopy(plain))
    with torch.set_grad_enabled(grad):
        found, expected = model(batch()), plain(batch())
        assert found[0].data_ptr() != found[1].data_ptr()
        for outputs in (found, expected):
            with torch.no_grad():
                outputs[0].zero_()
        assert torch.equal(found[1], expected[1]) and found[1].any()


def test_one_output_under_two_names_gets_both_gradients() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.layer(x)
            return {"y": y, "same": y, "view": y.view(-1)}

    torch.manual_seed(0)
    plain = Named()
    model = geminifx.compile(copy.deepcopy(plain))
    for names in (("y", "same", "view"), ("same",), ("view", "y")):
        for each in (model, plain):
            each.zero_grad()
            outputs = each(batch())
            torch.stack([outputs[name].square().sum() for name in names]).sum().backward()
        assert same_gradients(model, plain)


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda y: y.mul_(2),
    "relu_": lambda y: F.relu(y, inplace=True),
    "a slice": lambda y: y[0].zero_(),
    "through a view": lambda y: y.view(-1).add_(1),
    "without autograd": lambda y: y.detach().mul_(2),
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_an_output_that_the_backward_reads_may_not_be_changed(change: str) -> None:
    """Plain PyTorch refuses it as well: sigmoid's backward is computed from what it returned."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid())
    model = geminifx.compile(copy.deepcopy(plain))
    for each, error, message in ((plain, RuntimeError, "inplace"), (model, StateError, "an output of the model was")):
        y = each(batch())
        IN_PLACE[change](y)
        with pytest.raises(error, match=message):
            y.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    for each in (model, plain):
        each(batch()).sum().backward()
    assert same_gradients(model, plain)


@pytest.mark.parametrize("change", IN_PLACE)
def test_an_output_that_the_backward_does_not_read_may_be_changed(change: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Sigmoid(), nn.Linear(8, 4))
    model = geminifx.compile(copy.deepcopy(plain))
    for each in (model, plain):
        y = each(batch())
        IN_PLACE[change](y)
        y.square().sum().backward()
    assert same_gradients(model, plain)


class MeanLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.layer(x), torch.arange(4) % 3)


SEVERAL_RESULTS: dict[str, Callable[[], nn.Module]] = {
    "a mean loss": MeanLoss,
    "layer norm": lambda: nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)),
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)),
    "group norm": lambda: nn.Sequential(nn.Linear(8, 4), nn.GroupNorm(2, 4)),
    "max pool": lambda: nn.Sequential(nn.Linear(8, 8), nn.MaxPool1d(2)),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5)),
}


@pytest.mark.parametrize("kind", SEVERAL_RESULTS)
def test_an_output_beside_which_the_backward_reads_another_result_may_be_changed(kind: str) -> None:
    """A mean, an index or a mask, of the operator that made the output. Hugging Face's Trainer scales losses so."""
    torch.manual_seed(0)
    plain = SEVERAL_RESULTS[kind]()
    model = geminifx.compile(copy.deepcopy(plain))
    for each in (model, plain):
        torch.manual_seed(1)
        y = each(batch())
        y *= 2
        y.square().sum().backward()
    assert same_gradients(model, plain)


def test_an_output_that_the_next_layer_reads_may_not_be_changed() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return h, self.second(h)

    model = geminifx.compile(Hidden())
    h, y = model(batch())
    with torch.no_grad():
        h.zero_()
    with pytest.raises(StateError, match="change a copy instead"):
        y.sum().backward()


# -- an encoder and a decoder with a configuration each ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("padded", [0, 3])
def test_padding_is_masked_in_an_encoder_that_has_a_configuration_of_its_own(padded: int) -> None:
    plain = encoder_decoder()
    model = geminifx.compile(copy.deepcopy(plain))
    for rows in (4, 2):
        ids = torch.randint(3, VOCAB, (rows, 8), generator=torch.Generator().manual_seed(rows))
        mask = torch.ones_like(ids)
        mask[: rows // 2, 8 - padded :] = 0
        call = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        found, expected = model(**call).loss, plain(**call).loss
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)
        with torch.no_grad():
            assert torch.allclose(model(**call).logits, plain(**call).logits, rtol=1e-4, atol=1e-5)


class Roots(nn.Module):
    """The second output's gradient is 0 times infinity where nothing reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x * self.a).sum(), (self.b.sqrt() * x).sum()


def test_what_is_no_gradient_spoils_no_norm() -> None:
    model = geminifx.compile(Roots(), example_inputs=(torch.ones(4),))
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1, max_grad_norm=1.0)
    model(torch.ones(4))[0].backward()
    optimizer.step()
    assert optimizer.grad_norm.item() == 2.0
    assert torch.allclose(model.state_dict()["a"], torch.full((4,), 0.95)) and not model.state_dict()["b"].any()


def test_what_is_no_gradient_spoils_no_sum() -> None:
    model = geminifx.compile(Roots(), example_inputs=(torch.ones(4),))
    with torch.no_grad():
        model.source.b.fill_(0.0)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1, accumulate=2)
    model(torch.ones(4))[0].backward()
    model.load_state_dict({"a": torch.ones(4), "b": torch.ones(4)})
    model(torch.ones(4))[1].backward()
    optimizer.step()
    assert torch.equal(model.state_dict()["b"], torch.full((4,), 1 - 0.1 * 0.5))


def test_a_gradient_that_is_set_to_none_is_none() -> None:
    model = geminifx.compile(Roots(), example_inputs=(torch.ones(4),))
    optimizer = model.optimizer(torch.optim.AdamW, in_backward=True)
    model(torch.ones(4))[0].backward()
    optimizer.step()
    parameter = dict(model.named_parameters())["a"]
    assert parameter.grad is not None
    parameter.grad = None
    assert parameter.grad is None


def test_updates_in_the_backward_go_on_after_a_zero_that_was_refused() -> None:
    model = geminifx.compile(Roots(), example_inputs=(torch.ones(4),))
    model.load_state_dict({"a": torch.ones(4), "b": torch.ones(4)})
    optimizer = model.optimizer(torch.optim.AdamW, in_backward=True)
    sum(model(torch.ones(4))).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    model(torch.ones(4))[0].backward()
    with pytest.raises(StateError, match="set the gradient of b to zero"):
        optimizer.step()
    optimizer.zero_grad()
    model(torch.ones(4))[1].backward()
    optimizer.step()


def test_a_generator_of_the_model_runs_compiled_steps() -> None:
    class Streams(nn.Linear):
        def steps(self, batches: list[Tensor]) -> Iterator[Tensor]:
            for x in batches:
                yield self(x)

    model = geminifx.compile(Streams(8, 4))
    assert len(list(model.steps([batch(), batch()]))) == 2 == model.stats.steps


def test_an_only_output_without_a_gradient_gives_none() -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    model = geminifx.compile(nn.Linear(8, 4))
    Nothing.apply(model(batch())).sum().backward()
    assert model.source.weight.grad is None


class CatHead(nn.Module):
    """As MobileBERT's, whose logits are written in place: autograd makes them anew as views, behind the backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.extra = nn.Embedding(12, 6), nn.Linear(12, 2, bias=False)
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = torch.cat([self.embed(ids), self.embed(ids)[..., :2]], -1)
        logits = hidden.matmul(torch.cat([self.embed.weight.t(), self.extra.weight], 0))
        logits += self.bias
        return {"loss": F.cross_entropy(logits.view(-1, 12), ids.view(-1)), "logits": logits}


def test_outputs_that_are_views_come_in_front_of_the_backward() -> None:
    plain, model, ids = CatHead(), geminifx.compile(CatHead()), torch.arange(8).view(2, 4)
    found, expected = model(ids), plain(ids)
    for each in (found, expected):
        each["loss"].backward()
    assert torch.equal(found["loss"], expected["loss"]) and torch.equal(found["logits"], expected["logits"])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-7)  # the order of three terms


class Repeats(nn.Module):
    """Computes the same thing twice; an output is a view of a copy of one, another is made from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.layer(x)
        return h.exp().clone().view(2, 16).detach(), h.exp().view(2, 16), h.exp().sum()


def test_outputs_that_were_computed_twice_share_no_memory() -> None:
    torch.manual_seed(0)
    plain = Repeats()
    model = geminifx.compile(copy.deepcopy(plain))
    for each in (plain, model):
        changed, kept, loss = each(batch())
        before = kept.clone()
        changed.zero_()
        assert torch.equal(kept, before)
        loss.backward()
    assert same_gradients(plain, model)
