"""Training states: masters come back exactly, updates cover what has a gradient and nothing else."""

import math
from itertools import pairwise

import pytest
import torch
from geminifx.runtime.isa.formats import OwnFormat, longest_of_each_kind
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.layout import ChunkLayout, Slot
from geminifx.runtime.kernels.update_rules import SgdHyper
from geminifx.runtime.optimizer.states import ChunkState, Range
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DTYPES = {"split": torch.bfloat16, "plain": torch.float32, "cast": torch.float16}
SLOW, FAST = SgdHyper(lr=0.1), SgdHyper(lr=0.2)


def chunk(sizes: list[int], dtype: torch.dtype = torch.float32, trainable: bool = True) -> ChunkLayout:
    """Slots at multiples of 64 elements, whatever lies between."""
    slots, offset = [], 0
    for number, size in enumerate(sizes):
        slots.append(Slot(f"p{number}", offset, (size,)))
        offset += math.ceil(size / 64) * 64
    return ChunkLayout(0, offset, dtype, torch.float32, trainable, tuple(slots))


def state_of(layout: ChunkLayout, moments: int = 0, where: Where = Where.HOST) -> ChunkState:
    rest = OwnFormat().rest_dtype(layout)
    return ChunkState(
        layout, Home(where), torch.zeros(layout.numel, dtype=layout.dtype),
        rest=None if rest is None else torch.zeros(layout.numel, dtype=rest),
        moments=tuple(torch.zeros(layout.numel) for _ in range(moments)),
        steps=[0] * len(layout.slots),
    )  # fmt: skip


# -- masters -----------------------------------------------------------------------------------------------

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("kind", DTYPES)
@given(values=st.lists(FINITE, min_size=1, max_size=100))
def test_a_master_is_read_as_it_was_written(kind: str, values: list[float]) -> None:
    state = state_of(chunk([3, len(values)], DTYPES[kind]))
    master = torch.tensor(values, dtype=torch.float32)
    state.write(1, master)
    found = state.read(1)
    assert found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), master.view(torch.int32)), "the sign of zero, too"
    assert not state.read(0).any() and state.version == 1
    found.fill_(7)
    assert torch.equal(state.read(1), master), "reading it gives a gathered copy"
    weights = state.slice(state.weights, 1)
    if kind == "split":  # ties are rounded up, so that the remainder fits
        assert ((weights.float() - master).abs() <= (master.bfloat16().float() - master).abs()).all()
    else:
        assert torch.equal(weights, master.to(DTYPES[kind]))


@given(values=st.lists(FINITE, min_size=1, max_size=20))
def test_a_bfloat16_value_is_written_as_it_is(values: list[float]) -> None:
    state = state_of(chunk([len(values)], torch.bfloat16))
    state.write(0, torch.randn(len(values)))
    low = torch.tensor(values).bfloat16()
    state.write(0, low)
    assert torch.equal(state.read(0), low.float())


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("gradient", ["none", "held", "sum"])
def test_another_tiers_state_becomes_a_copy(kind: str, gradient: str) -> None:
    layout = chunk([5, 70], DTYPES[kind])
    old, new = state_of(layout, moments=2), state_of(layout, moments=2, where=Where.DEVICE)
    values = [torch.randn(5), torch.randn(70)]
    for slot, value in enumerate(values):
        old.write(slot, value)
    for moment in old.moments:
        moment.normal_()
    old.steps, old.version = [3, 1], 9
    expected: Tensor | None = None
    if gradient != "none":
        old.present, old.measured, old.added = {1}, {1}, gradient == "sum"
        expected = torch.randn(layout.numel).to(layout.dtype if gradient == "held" else torch.float32)
        old.held, old.total = (expected, None) if gradient == "held" else (None, expected)
        new.total = None if gradient == "held" else torch.zeros(layout.numel)
    new.take(old)
    assert all(torch.equal(new.read(slot), value) for slot, value in enumerate(values))
    assert all(map(torch.equal, new.moments, old.moments))
    assert (new.steps, new.version, new.present, new.measured) == ([3, 1], 9, old.present, old.measured)
    if expected is not None:
        assert (torch.equal(new.gradient, expected) and new.gradient is not expected) or new.where is Where.DEVICE


# -- what is updated ---------------------------------------------------------------------------------------


@given(
    slots=st.lists(
        st.tuples(st.integers(0, 200), st.booleans(), st.sampled_from([SLOW, FAST, None])), min_size=1, max_size=9
    ),
    backwards=st.booleans(),
)
def test_every_gradient_is_in_one_range_and_no_other_parameter_in_any(
    slots: list[tuple[int, bool, SgdHyper | None]], backwards: bool
) -> None:
    """A slot is (elements, whether it has a gradient, how it is updated or None)."""
    layout = chunk([size for size, _, _ in slots])
    if backwards:  # the order of slots in the list says nothing of their places
        layout = ChunkLayout(0, layout.numel, layout.dtype, layout.master_dtype, True, layout.slots[::-1])
        slots = slots[::-1]
    state = state_of(layout)
    state.present = {number for number, (_, present, _) in enumerate(slots) if present}
    hypers = {place.name: hyper for place, (_, _, hyper) in zip(layout.slots, slots, strict=True)}
    found = state.ranges(lambda asked: [hypers[name] for name, _ in asked])
    assert all(a.end <= b.start for a, b in pairwise(found)), "in order, without overlaps"
    covered = [0] * layout.numel
    for elements in found:
        for element in range(elements.start, elements.end):
            covered[element] += 1
    updated = 0
    for number, (place, (size, present, hyper)) in enumerate(zip(layout.slots, slots, strict=True)):
        inside = covered[place.offset : place.offset + size]
        wanted = present and hyper is not None
        assert inside == [int(wanted)] * size
        assert state.steps[number] == int(wanted)
        updated += wanted and size > 0
        over = [s.hyper for s in found if s.start < place.offset + size and s.end > place.offset]
        assert all(each == hyper for each in over) or not wanted or size == 0
    assert len(found) <= updated
    alike = {hyper for _, present, hyper in slots if present}
    if len(state.present) == len(slots) and len(alike) == 1 and None not in alike:
        assert len(found) == min(updated, 1), "as few as there can be"


def test_a_range_of_several_parameters_has_no_place_in_one() -> None:
    state = state_of(chunk([64, 64, 64]))
    state.present, state.firsts = {0, 1, 2}, (5, 6, 7)
    found = state.ranges(lambda asked: [FAST, SLOW, SLOW])
    assert found == [Range(0, 64, FAST, first=5), Range(64, 192, SLOW)]


def test_updates_are_counted_per_parameter_from_one() -> None:
    state, asked = state_of(chunk([4, 4])), []

    def schedule(parameters: list[tuple[str, int]]) -> list[SgdHyper]:
        asked.extend(parameters)
        return [SLOW for _ in parameters]

    for present in ({0, 1}, {1}, {0, 1}):
        state.present = present
        state.ranges(schedule)
    assert asked == [("p0", 1), ("p1", 1), ("p1", 2), ("p0", 2), ("p1", 3)]


@given(start=st.integers(0, 50), length=st.integers(0, 500), piece=st.integers(1, 200))
def test_pieces_are_the_range(start: int, length: int, piece: int) -> None:
    pieces = list(Range(start, start + length, FAST).pieces(piece))
    assert [element for p in pieces for element in range(p.start, p.end)] == list(range(start, start + length))
    assert all(p.end - p.start <= piece and p.hyper == FAST for p in pieces)
    assert len(pieces) == math.ceil(length / piece)


# -- what there is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "master", "rest"),
    [
        (torch.bfloat16, torch.float32, torch.int16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, None),
        (torch.float64, torch.float64, None),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_weights_lack_a_remainder_the_master_or_nothing(
    dtype: torch.dtype, master: torch.dtype, rest: torch.dtype | None
) -> None:
    layout = ChunkLayout(0, 64, dtype, master, True, ())
    assert OwnFormat().rest_dtype(layout) == rest
    expected = dtype.itemsize + (0 if rest is None else rest.itemsize)
    assert OwnFormat(moments=0).state_bytes(layout) == 64 * expected


def test_gradients_that_are_kept() -> None:
    trained, frozen = chunk([8]), chunk([8], trainable=False)
    for accumulate, in_backward, total, held in [
        (1, False, False, True),
        (1, True, False, False),
        (2, True, True, False),
    ]:
        format = OwnFormat(accumulate=accumulate, in_backward=in_backward)
        there, here, streamed = map(Home, (Where.DEVICE, Where.HOST, Where.STREAMED))
        assert (format.keeps_sum(trained), format.held_bytes(trained, there) > 0) == (total, held)
        assert not format.keeps_sum(frozen) and not format.held_bytes(frozen, there)
        assert not format.held_bytes(trained, here) and not format.lands(trained, there)
        assert format.lands(trained, here) and not format.lands(frozen, here)
        assert format.lands(trained, streamed) is not format.at_once


def test_the_longest_chunk_of_each_kind() -> None:
    sizes = [(64, torch.bfloat16), (640, torch.float32), (128, torch.bfloat16), (64, torch.float32)]
    chunks = [ChunkLayout(i, size, dtype, torch.float32, True, ()) for i, (size, dtype) in enumerate(sizes)]
    assert [layout.index for layout in longest_of_each_kind((c, Home(Where.STREAMED)) for c in chunks)] == [2, 1]
    assert longest_of_each_kind(()) == []


def test_messages_name_a_few_parameters() -> None:
    assert state_of(chunk([1, 1])).name == "p0, p1"
    assert state_of(chunk([1] * 5)).name == "p0, p1, p2 and 2 more"
