"""States on their way through the device: piece by piece, with every gradient that they need."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from geminifx.runtime.isa.formats import STREAM_BUFFERS, OwnFormat
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.layout import ChunkLayout, Slot
from geminifx.runtime.kernels.update_rules import AdamHyper, Gradient, SgdHyper
from geminifx.runtime.memory.hardware import Hardware
from geminifx.runtime.memory.streams import ImmediateCopies
from geminifx.runtime.optimizer import state_stream
from geminifx.runtime.optimizer.state_stream import StateStream, StreamedUpdate
from geminifx.runtime.optimizer.states import ChunkState, Range
from geminifx.runtime.optimizer.updates import UpdateKernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from late_copies import ENGINES
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("copies"), pytest.mark.parametrize("copies", ENGINES, indirect=True)]

CPU = torch.device("cpu")
HARDWARE = Hardware(CPU)
ADAM = AdamHyper(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=2)
NUMEL = 257
STREAMED = Home(Where.STREAMED)


def random_state(dtype: torch.dtype, moments: int, seed: int = 0) -> ChunkState:
    seeded = torch.Generator().manual_seed(seed)
    layout = ChunkLayout(0, NUMEL, dtype, torch.float32, True, (Slot("w", 0, (NUMEL,)),))
    rest = OwnFormat().rest_dtype(layout)
    state = ChunkState(
        layout, STREAMED, torch.zeros(NUMEL, dtype=dtype),
        rest=None if rest is None else torch.zeros(NUMEL, dtype=rest),
        moments=tuple(torch.rand(NUMEL, generator=seeded) for _ in range(moments)), steps=[1],
    )  # fmt: skip
    state.write(0, torch.randn(NUMEL, generator=seeded))
    return state


def everything(state: ChunkState) -> list[Tensor]:
    return [state.read(0), state.weights, *state.moments]


KINDS = {"split": torch.bfloat16, "plain": torch.float32, "cast": torch.float16}
RULES = {"adam": (ADAM, 2), "sgd": (SgdHyper(lr=0.1), 0)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    piece=st.integers(16, 300),
    cuts=st.lists(st.integers(0, NUMEL), max_size=2),
    with_gradients=st.booleans(),
    stay=st.booleans(),
    total=st.booleans(),
)
def test_a_streamed_update_is_the_update(
    kind: str, rule: str, piece: int, cuts: list[int], with_gradients: bool, stay: bool, total: bool
) -> None:
    """Whatever the pieces, the ranges, and whether the gradient travels: in the compute dtype, or as a sum in
    float32 that is longer than the room that was made for it."""
    hyper, moments = RULES[rule]
    state, expected = (random_state(KINDS[kind], moments) for _ in range(2))
    gradient = Gradient(torch.randn(NUMEL).to(torch.float32 if total else KINDS[kind]), 0.5)
    bounds = sorted({0, *cuts, NUMEL})
    ranges = [Range(a, b, hyper) for a, b in pairwise(bounds)]
    if len(ranges) == 3:
        del ranges[1]  # a parameter without a gradient in between
    kernels = UpdateKernels(CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_stream, "STREAM_PIECE", piece)
        stream = StateStream(HARDWARE, state, with_gradients=with_gradients)
    stream.update(state, ranges, StreamedUpdate(gradient, kernels, stay))
    stream.finish(0)
    for elements in ranges:
        part = expected.part(elements)
        values = Gradient(gradient.values[elements.start : elements.end], gradient.scale)
        kernels.update(expected.layout, part, values, elements)
    found, wanted = everything(state), everything(expected)
    if kind == "split":
        assert all(map(torch.equal, found, wanted))
    else:  # torch's own kernels round the last few elements of a tensor in another way
        assert all(
            torch.allclose(a.float(), b.float(), rtol=2**-10, atol=1e-6) for a, b in zip(found, wanted, strict=True)
        )
    assert not torch.equal(found[0], random_state(KINDS[kind], moments).read(0)) or not ranges


class Counted(ImmediateCopies):
    """Counts bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = self.down = 0

    def all_to_device(self, pairs: Any, *after: Any) -> None:
        self.up += sum(target.nbytes for target, _ in pairs)
        assert all(target.dtype == source.dtype for target, source in pairs), "casts are not copied asynchronously"
        super().all_to_device(pairs, *after)

    def all_to_host(self, pairs: Any, *after: Any) -> None:
        self.down += sum(target.nbytes for target, _ in pairs)
        super().all_to_host(pairs, *after)


@pytest.mark.parametrize(("stay", "with_gradients", "up", "down"), [
    (False, False, 12, 12), (False, True, 14, 12), (True, False, 10, 10), (True, True, 12, 10),
])  # fmt: skip
def test_only_what_is_not_there_travels(stay: bool, with_gradients: bool, up: int, down: int) -> None:
    state = random_state(torch.bfloat16, 2)
    stream = StateStream(HARDWARE, state, with_gradients=with_gradients)
    copies = stream.copies = Counted()
    gradient = Gradient(torch.randn(NUMEL).bfloat16())
    stream.update(state, [Range(0, NUMEL, ADAM)], StreamedUpdate(gradient, UpdateKernels(CPU), stay))
    assert (copies.up, copies.down) == (up * NUMEL, down * NUMEL)


@pytest.mark.parametrize("declared", [{}, {"in_backward": True}, {"accumulate": 2}, {"moments": 0}])
@pytest.mark.parametrize("kind", KINDS)
def test_the_buffers_are_as_large_as_is_planned(kind: str, declared: dict[str, Any]) -> None:
    format = OwnFormat(**declared)
    state = random_state(KINDS[kind], format.moments)
    if format.accumulate > 1:
        state.total = torch.zeros(NUMEL)
    stream = StateStream(HARDWARE, state, with_gradients=not format.at_once)
    tensors = [
        tensor
        for buffer in stream._buffers
        for tensor in (buffer.part.weights, buffer.part.rest, *buffer.part.moments, buffer.gradient)
        if tensor is not None
    ]
    assert sum(tensor.nbytes for tensor in tensors) == format.stream_bytes([(state.layout, STREAMED)])
    assert len(stream._buffers) == STREAM_BUFFERS
