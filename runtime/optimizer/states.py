"""Training states: what our own optimizer keeps of each chunk, and on which tier.

A chunk's *weights* are what programs compute with; the *rest* is what they lack of the float32 master: a 16-bit
remainder where they are bfloat16 (see `split_pairs`), the whole master where they are float16, nothing where
they are the master themselves, or all that is kept of it. Beside them lie the moments, and between backward and update
a gradient.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed.local_shards import Region
from ..isa.homes import Home, Where
from ..isa.layout import ChunkLayout, Slot
from ..isa.moments import stored_at, unit
from ..kernels.moments import narrow, widened
from ..kernels.rounding import Draws
from ..kernels.split_pairs import SplitPair, join, split
from ..kernels.update_rules import AdafactorHyper, AdamHyper, LionHyper, MuonHyper, SgdHyper

Hyper = AdamHyper | SgdHyper | LionHyper | MuonHyper | AdafactorHyper
SQUARES = 1
"""The number of the moment that is a mean of squares."""

Inside = tuple[slice, ...]
"""A part of a region."""

Schedule = Callable[[str, int], Hyper | None]
"""From a parameter's name and the number of its next update, counted from 1, to how it is updated."""


@dataclass(frozen=True)
class StateSlice:
    """A contiguous slice of a training state, 1-D: one part of the parameters that are updated alike."""

    weights: Tensor
    rest: Tensor | None
    moments: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All of it, the weights first."""
        return [self.weights, *([] if self.rest is None else [self.rest]), *self.moments]

    def cut(self, cut: slice) -> "StateSlice":
        """Some of its elements; where moments share scales, from the beginning of a block on."""
        return self.with_moments(cut, tuple(moment[stored_at(moment.dtype, cut)] for moment in self.moments))

    def with_moments(self, cut: slice, moments: tuple[Tensor, ...]) -> "StateSlice":
        """Some of its elements, and their moments."""
        return StateSlice(self.weights[cut], None if self.rest is None else self.rest[cut], moments)

    def room_for(self, other: "StateSlice") -> "StateSlice":
        """As much of it as another one takes."""
        pairs = zip(self.moments, other.moments, strict=False)
        moments = tuple(mine[: theirs.numel()] for mine, theirs in pairs)
        return self.with_moments(slice(0, other.weights.numel()), moments)


@dataclass(frozen=True)
class Range:
    """Elements `start` to `end` of a chunk, all of whose parameters are updated by `hyper`. Of one that is a single
    parameter's, `first` is the number of its first element there. `shape` is that of a parameter which is updated as a
    whole."""

    start: int
    end: int
    hyper: Hyper
    first: int = 0
    shape: tuple[int, ...] | None = None

    def pieces(self, numel: int) -> Iterator["Range"]:
        """The range in pieces of at most `numel` elements; a whole parameter as it is."""
        if self.shape is not None:
            yield self
            return
        for start in range(self.start, self.end, numel):
            yield Range(start, min(start + numel, self.end), self.hyper, self.first + start - self.start)

    @property
    def draws(self) -> Draws | None:
        """What masters are rounded by, unless they are exact."""
        return None if self.hyper.key is None else Draws(self.hyper.key, self.first)


@dataclass
class Early:
    """An update that was begun before the step that may ask for it."""

    ranges: list[Range]
    is_wanted: bool = True


@dataclass
class ChunkState:
    """The training state of one chunk, or of one process's shard of it; all tensors are flat and as long as that, but
    for moments, which are as long as they are stored.

    `held` is a gradient in the compute dtype, times the loss scale, and still to be multiplied by `clipped`; `total` is
    one in the master's dtype, to which several are added. `present` are the slots that either has a gradient for.
    `firsts` tells of each slot the number of its first element in the parameter, where that is divided.
    `spare` is a second place for all of it, where `early` is being written: the update by this gradient, before the
    step that asks for it.
    """

    layout: ChunkLayout
    home: Home
    weights: Tensor
    rest: Tensor | None
    moments: tuple[Tensor, ...]
    steps: list[int] = field(default_factory=list)
    firsts: tuple[int, ...] = ()
    held: Tensor | None = None
    total: Tensor | None = None
    added: bool = False
    clipped: Tensor | None = None
    present: set[int] = field(default_factory=set)
    measured: set[int] = field(default_factory=set)
    version: int = 0
    spare: StateSlice | None = None
    early: Early | None = None

    @property
    def where(self) -> Where:
        return self.home.where

    @property
    def name(self) -> str:
        """The chunk by its parameters, for messages."""
        names = [slot.name for slot in self.layout.slots]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def slice(self, flat: Tensor, slot: int) -> Tensor:
        return self.layout.slots[slot].of(flat)

    def read(self, slot: int) -> Tensor:
        """One parameter's master, in a tensor of its own."""
        weights = self.slice(self.weights, slot)
        if self.rest is None:
            return weights.to(self.layout.master_dtype, copy=True)
        rest = self.slice(self.rest, slot)
        # Of a resident chunk that is streamed only the weights are on the device.
        return join(SplitPair(weights.to(rest.device), rest)) if self.layout.splits else rest.clone()

    def write(self, slot: int, value: Tensor) -> None:
        """Set one parameter's master."""
        weights = self.slice(self.weights, slot)
        self.version += 1
        if self.rest is None:
            weights.copy_(value)
        elif self.layout.splits and value.dtype == torch.bfloat16:
            weights.copy_(value)
            self.slice(self.rest, slot).zero_()
        elif self.layout.splits:
            halves = split(value.detach().to(weights.device, torch.float32))
            weights.copy_(halves.hi)
            self.slice(self.rest, slot).copy_(halves.lo)
        else:
            self.slice(self.rest, slot).copy_(value)
            weights.copy_(value)

    @property
    def travelling_moments(self) -> tuple[Tensor, ...]:
        """Those that lie where the rest of the state does: factors are on the device."""
        return () if self.layout.rule == "factored" else self.moments

    def moment_places(self, slot: int) -> list[tuple[Tensor, Slot]]:
        """What a parameter's moments lie in, and where in there."""
        if self.layout.rule == "factored":
            return [(self.moments[0], place) for place in self.layout.factors[slot]]
        return [(moment, self.layout.slots[slot]) for moment in self.moments]

    def read_moment(self, number: int, slot: int) -> Tensor:
        """One of a parameter's moments in the master's dtype: itself where it is exact, else a copy."""
        moment, place = self.moment_places(slot)[number]
        if moment.dtype == self.layout.master_dtype:
            return moment.narrow(0, place.offset, place.numel).view(place.shape)
        cut = moment[stored_at(moment.dtype, slice(place.offset, place.offset + place.numel))]
        values = widened(cut, place.numel, self.layout.master_dtype, squares=number == SQUARES)
        return values.view(place.shape)

    def write_moment(self, number: int, slot: int, values: Tensor) -> None:
        """Set one of a parameter's moments."""
        moment, place = self.moment_places(slot)[number]
        cut = moment[stored_at(moment.dtype, slice(place.offset, place.offset + place.numel))]
        narrow(values.to(cut.device).reshape(-1), cut, squares=number == SQUARES)

    def read_region(self, region: Region) -> Tensor:
        """The masters of a region, which counts elements of the state."""
        weights = region.of(self.weights)
        if self.rest is None:
            return weights.to(self.layout.master_dtype)
        rest = region.of(self.rest)
        if not self.layout.splits:
            return rest
        return join(SplitPair(weights.to(rest.device).contiguous(), rest.contiguous()))

    def write_region(self, region: Region, inside: Inside, values: Tensor) -> None:
        """Set the masters of a part of a region."""
        weights = region.of(self.weights)[inside]
        if self.rest is None:
            weights.copy_(values)
            return
        rest = region.of(self.rest)[inside]
        if self.layout.splits:
            halves = split(values.to(weights.device, torch.float32))
            weights.copy_(halves.hi)
            rest.copy_(halves.lo)
        else:
            rest.copy_(values)
            weights.copy_(values)

    def take(self, other: "ChunkState") -> None:
        """Become a copy of the same chunk's state on another tier."""
        self.weights.copy_(other.weights)
        for target, source in zip(self._beside_weights(), other._beside_weights(), strict=True):
            target.copy_(source)
        self.steps, self.version = other.steps, other.version
        self.present, self.measured, self.added = other.present, other.measured, other.added
        self.clipped = other.clipped
        other.call_off()
        if self.added:
            assert self.total is not None and other.total is not None
            self.total.copy_(other.total)
        elif self.present and other.held is not None:
            self.held = other.held.to(self.weights.device) if self.held is None else self.held.copy_(other.held)

    def _beside_weights(self) -> tuple[Tensor, ...]:
        return self.moments if self.rest is None else (self.rest, *self.moments)

    def part(self, elements: Range) -> StateSlice:
        """What is updated together; of moments that are factors those of the parameter."""
        cut, state = slice(elements.start, elements.end), StateSlice(self.weights, self.rest, self.moments)
        if self.layout.rule != "factored":
            return state.cut(cut)
        slot = next(i for i, s in enumerate(self.layout.slots) if s.offset == elements.start and s.numel)
        return state.with_moments(cut, tuple(self.read_moment(n, slot) for n in range(len(self.layout.factors[slot]))))

    @property
    def gradient(self) -> Tensor:
        """The gradient to update with: the sum where several were added, else the one that is held."""
        found = self.total if self.added else self.held
        assert found is not None
        return found

    def ranges(self, schedule: Schedule, *, counts: bool = True) -> list[Range]:
        """What to update, as few and as long as parameters that are updated alike allow, as none are whose masters are
        rounded; where it `counts`, as one more step of each."""
        found: list[Range] = []
        joins, together = False, max((unit(moment.dtype) for moment in self.moments), default=1)
        for slot, place in sorted(enumerate(self.layout.slots), key=lambda item: (item[1].offset, item[1].numel)):
            hyper = schedule(place.name, self.steps[slot] + 1) if slot in self.present else None
            if hyper is None:
                joins = False
                continue
            self.steps[slot] += counts  # of every parameter on every process, whoever holds it
            if place.numel == 0:
                continue
            end = min(place.offset + -(-place.numel // together) * together, self.layout.numel)
            if joins and found[-1].hyper == hyper:
                found[-1] = Range(found[-1].start, end, hyper)
            else:
                first = self.firsts[slot] if self.firsts else 0
                found.append(Range(place.offset, end, hyper, first, place.shape if self.layout.is_whole else None))
            joins = not self.layout.is_whole
        return found

    def call_off(self) -> None:
        """The update that was begun before the step is not the one that this will ask for."""
        if self.early is not None:
            self.early.is_wanted = False
            self.early = None

    def exchange(self) -> None:
        """Let the spare be the state, and the state the spare."""
        assert self.spare is not None
        before = StateSlice(self.weights, self.rest, self.moments)
        self.weights, self.rest, self.moments = self.spare.weights, self.spare.rest, self.spare.moments
        self.spare = before

    def forget_gradient(self) -> None:
        self.added, self.clipped = False, None
        self.call_off()
        if self.where is Where.DEVICE:
            self.held = None
        self.present.clear()
