"""Parameters and buffers that the forward takes from lists, objects and other names are those of its modules."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import CaptureError
from torch import Tensor, nn
from torch.optim import SGD


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


class Takes(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.ones(4))
        self.all = [self.layer.weight, {"bias": self.layer.bias}]
        self.args = SimpleNamespace(counts=(self.count,))
        object.__setattr__(self, "other", self.count)
        self.plain = {"a": torch.ones(4)}
        self.steps = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def counted_elsewhere(m: Any, x: Tensor) -> Tensor:
    m.args.counts[0].add_(1)
    return m.layer(x) * m.count


def counted_and_read_elsewhere(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.layer(x) * m.args.counts[0] * m.other


TAKEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "from a list": lambda m, x: x @ m.all[0],
    "from a dict in it, too": lambda m, x: m.layer(x) @ m.all[0] + m.all[1]["bias"],
    "by a function of several": lambda m, x: x @ torch.cat([*m.all[:1], m.layer.weight]).sum(0, keepdim=True).t() + x,
    "a buffer": lambda m, x: m.layer(x) * m.args.counts[0] * m.other,
    "a buffer that was written to": counted_and_read_elsewhere,
    "a buffer, to write to it": counted_elsewhere,
    "a copy for a function of its own": lambda m, x: x @ Double.apply(m.all[0].clone()),
}


@pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our own"])
@pytest.mark.parametrize("how", TAKEN)
def test_what_is_taken_from_elsewhere_trains_as_in_plain_pytorch(how: str, ours: bool) -> None:
    torch.manual_seed(0)
    plain = Takes(TAKEN[how])
    model, x = geminifx.compile(copy.deepcopy(plain), example_inputs=(torch.ones(2, 4),)), torch.randn(2, 4)
    optimizers = (
        model.optimizer(SGD, lr=0.1) if ours else SGD(model.parameters(), lr=0.1, fused=True),
        SGD(plain.parameters(), lr=0.1, fused=True),
    )
    for _ in range(3):
        losses = [each(x).square().mean() for each in (model, plain)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for (name, found), right in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (found.grad is None) == (right.grad is None), name
            assert right.grad is None or torch.equal(found.grad, right.grad), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found, expected = model.state_dict(), plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def replaces(m: Any, x: Tensor) -> Tensor:
    m.count = m.count + 1
    return m.layer(x) * m.args.counts[0]


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a buffer that is replaced": (replaces, "replaces the buffer count, which it also reads through another reference"),
    "for a function of its own": (lambda m, x: x @ Double.apply(m.all[0]), "passes the parameter layer.weight, which"),
}


NAMED, UNNAMED = (
    r"the tensor plain\['a'\], which is not a buffer",
    "a tensor that is neither a buffer nor created in the forward",
)
WRITES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "a number": (lambda t, x: t.add_(1), NAMED),
    "out=": (lambda t, x: torch.add(t, 1, out=t), NAMED),
    "what is computed": (lambda t, x: t.copy_(x[0]), UNNAMED),
    "an element": (lambda t, x: t.__setitem__(0, 2), UNNAMED),
    "a view": (lambda t, x: t[:2].zero_(), UNNAMED),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_to_a_tensor_that_is_no_buffer_is_refused(how: str) -> None:
    write, told = WRITES[how]

    def forward(m: Any, x: Tensor) -> Tensor:
        write(m.plain["a"], x)
        return m.layer(x) * m.plain["a"]

    source = Takes(forward)
    with pytest.raises(CaptureError, match=rf"writes to {told}(?s:.)*register_buffer"):
        geminifx.compile(source)(torch.ones(2, 4))
    assert torch.equal(source.plain["a"], torch.ones(4))


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_followed_is_refused(how: str) -> None:
    forward, message = REFUSED[how]
    with pytest.raises(CaptureError, match=message):
        geminifx.compile(Takes(forward))(torch.ones(2, 4))


OUTSIDE: dict[str, Callable[[Any], Any]] = {
    "computed of a parameter": lambda m: m.layer.weight * 2,
    "computed of one, in a list": lambda m: [m.layer.weight * 2],
    "a tensor that is no parameter": lambda m: torch.ones(4, 4, requires_grad=True),
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_tensor_of_outside_the_forward_that_would_get_a_gradient_is_refused(how: str) -> None:
    source = Takes(lambda m, x: m.layer(x) @ (m.outside[0] if isinstance(m.outside, list) else m.outside))
    source.outside = OUTSIDE[how](source)
    model, x = geminifx.compile(source), torch.ones(2, 4)
    with pytest.raises(
        CaptureError, match=r"a tensor of shape \[4, 4\] that comes from outside the forward and requires a"
    ):
        model(x)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def test_a_tensor_of_outside_the_forward_that_nothing_reads_is_no_trouble() -> None:
    source = Takes(lambda m, x: m.layer(x))
    source.outside = [source.layer.weight * 2]
    assert torch.equal(geminifx.compile(source)(torch.ones(2, 4)), source(torch.ones(2, 4)))
