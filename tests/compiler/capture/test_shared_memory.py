"""Buffers that the forward writes to and over whose memory there is another tensor, and tensors over the memory of a
trained parameter that no attribute of a module is: each is refused when it goes wrong."""

from collections.abc import Callable
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import CaptureError, StateError
from torch import Tensor, nn


class Counts(nn.Module):
    def __init__(self, keep: Callable[[Any], Any], use: Callable[[Any], Any], writes: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.ones(4))
        self.use, self.writes = use, writes
        keep(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.writes:
            self.count.add_(1)
        return self.layer(x) * self.use(self) * (1 if y is None else y)


KEPT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "a buffer": (lambda m: m.register_buffer("part", m.count[:1]), lambda m: m.part, "shares with part,"),
    "a buffer that is not read": (lambda m: m.register_buffer("part", m.count[:1]), lambda m: 1, "shares with part,"),
    "an attribute": (
        lambda m: setattr(m, "square", m.count.view(2, 2)),
        lambda m: m.square.sum(),
        "shares with square,",
    ),
    "in a list": (lambda m: setattr(m, "some", [m.count[1:]]), lambda m: m.some[0].sum(), "shares with some[0],"),
}


def model_of(keep: Callable[[Any], Any], use: Callable[[Any], Any], writes: bool = True) -> Counts:
    torch.manual_seed(0)
    return Counts(keep, use, writes)


@pytest.mark.parametrize("kept", KEPT)
def test_a_buffer_that_is_written_to_is_the_only_tensor_over_its_memory(kept: str) -> None:
    keep, use, message = KEPT[kept]
    with pytest.raises(CaptureError) as refusal:
        geminifx.compile(model_of(keep, use))(torch.ones(2, 4))
    assert "writes to the buffer count" in str(refusal.value) and message in str(refusal.value)


@pytest.mark.parametrize("kept", KEPT)
def test_buffers_that_the_forward_only_reads_may_share_memory_and_are_written_outside(kept: str) -> None:
    keep, use, _ = KEPT[kept]
    plain, source = model_of(keep, use, writes=False), model_of(keep, use, writes=False)
    model = geminifx.compile(source)
    for _ in range(2):
        assert torch.equal(model(torch.ones(2, 4)), plain(torch.ones(2, 4)))
        plain.count.add_(1)
        source.count.add_(1)


def closing(value: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
    """Lets a model have a function that closes over a tensor."""

    def keep(model: Any) -> None:
        held = value(model)
        model.held = lambda: held

    return keep


def test_tensors_that_functions_close_over_are_looked_at_when_they_are_read() -> None:
    x, use = torch.ones(2, 4), lambda m: m.held().sum()
    with pytest.raises(CaptureError, match=r"writes to the buffer count, .* a \[4\] tensor that is not an attribute"):
        geminifx.compile(model_of(closing(lambda m: m.count), use))(x)
    with pytest.raises(CaptureError, match=r"a \[4, 4\] tensor .* the memory of parameter layer.weight"):
        geminifx.compile(model_of(closing(lambda m: m.layer.weight.data), use))(x)
    plain, source = (model_of(closing(lambda m: m.count[1:]), use, writes=False) for _ in range(2))
    assert torch.equal(geminifx.compile(source)(x), plain(x))


@pytest.mark.parametrize("part", [slice(None), slice(1)])
def test_an_input_in_the_memory_of_a_buffer_that_is_written_to_is_refused(part: slice) -> None:
    nothing: Callable[[Any], Any] = lambda m: 1  # noqa: E731
    plain, source, x = model_of(nothing, nothing), model_of(nothing, nothing), torch.ones(2, 4)
    model = geminifx.compile(source)
    with pytest.raises(StateError, match=r"shares the memory of the buffer count.*pass a copy"):
        model(x, source.count[part])
    assert torch.equal(source.count, torch.ones(4))
    assert torch.equal(model(x, source.count[part].clone()), plain(x, plain.count[part].clone()))
