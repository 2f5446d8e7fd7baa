"""Training states: what the built-in optimizer keeps of each chunk, and on which tier.

A chunk's *weights* are what programs compute with. The *rest* is what the weights lack of the float32 master: a 16-bit
remainder if they are bfloat16 (see `split_pairs`), the whole master if they are float16, nothing if the weights are
the master or no more than them is kept. The state also holds the moments and, between backward and update, a gradient.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
"""The index of the moment that is a running mean of squared gradients."""

Inside = tuple[slice, ...]
"""A part of a region, one slice per dimension."""

Schedule = Callable[[list[tuple[str, int]]], list[Hyper | None]]
"""Maps parameters' names, each with the number of its next update, counted from 1, to the updates' hyper-parameters;
None where a parameter is not updated."""


@dataclass(frozen=True)
class StateSlice:
    """A contiguous 1-D slice of a training state, whose elements are all updated with the same hyper-parameters."""

    weights: Tensor
    rest: Tensor | None
    moments: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All of its tensors, the weights first."""
        return [self.weights, *([] if self.rest is None else [self.rest]), *self.moments]

    def cut(self, cut: slice) -> "StateSlice":
        """A part of the elements; where moments share scales, it must start at a block."""
        return self.with_moments(cut, tuple(moment[stored_at(moment.dtype, cut)] for moment in self.moments))

    def with_moments(self, cut: slice, moments: tuple[Tensor, ...]) -> "StateSlice":
        """A part of the elements, with `moments` as theirs."""
        return StateSlice(self.weights[cut], None if self.rest is None else self.rest[cut], moments)

    def room_for(self, other: "StateSlice") -> "StateSlice":
        """The first elements of this slice, as many as `other` has."""
        pairs = zip(self.moments, other.moments, strict=False)
        moments = tuple(mine[: theirs.numel()] for mine, theirs in pairs)
        return self.with_moments(slice(0, other.weights.numel()), moments)


@dataclass(frozen=True)
class Range:
    """Elements `start` to `end` of a chunk, updated with the same hyper-parameters.

    `first` is the index, within its parameter, of the element at `start`, for ranges of a single parameter; `shape` is
    the parameter's, for one that is updated as a whole.
    """

    start: int
    end: int
    hyper: Hyper
    first: int = 0
    shape: tuple[int, ...] | None = None

    def pieces(self, numel: int) -> Iterator["Range"]:
        """Cuts the range into pieces of at most `numel` elements; parameters updated as a whole stay whole."""
        if self.shape is not None:
            yield self
            return
        for start in range(self.start, self.end, numel):
            yield Range(start, min(start + numel, self.end), self.hyper, self.first + start - self.start)

    @property
    def draws(self) -> Draws | None:
        """The random draws that round the masters; None if masters are exact."""
        return None if self.hyper.key is None else Draws(self.hyper.key, self.first)


@dataclass
class Early:
    """An update that was begun ahead of the step that may want it."""

    ranges: list[Range]
    is_wanted: bool = True


@dataclass
class ChunkState:
    """The training state of one chunk, or of this process's shard of it.

    Tensors are flat and have one element per element of the chunk, except moments, whose length depends on how they
    are stored, and factors of moments.

    `held` is the gradient of one backward in the compute dtype, still to be divided by the loss scale and multiplied by
    `clipped`; `total` is a sum of gradients in the master's dtype, and in use where `added`. `present` are the slots
    that have a gradient, `measured` those that the last norm covered. `steps` counts each slot's updates. `firsts` has,
    for each slot of a divided chunk, the index within the parameter of its first element here. `version` counts writes
    to the weights. `spare` is a second place for the state, which `early` is written to: the update with the present
    gradient, ahead of the step that asks for it.
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
        """The chunk's parameters, for messages."""
        names = [slot.name for slot in self.layout.slots]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def slice(self, flat: Tensor, slot: int) -> Tensor:
        return self.layout.slots[slot].of(flat)

    def read(self, slot: int) -> Tensor:
        """A copy of one parameter's master."""
        weights = self.slice(self.weights, slot)
        if self.rest is None:
            return weights.to(self.layout.master_dtype, copy=True)
        rest = self.slice(self.rest, slot)
        # A streamed chunk that is resident has only its weights on the device.
        return join(SplitPair(weights.to(rest.device), rest)) if self.layout.splits else rest.clone()

    def write(self, slot: int, value: Tensor) -> None:
        """Sets one parameter's master."""
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
        """The moments that lie with the rest of the state; factors of moments stay on the device."""
        return () if self.layout.rule == "factored" else self.moments

    def moment_places(self, slot: int) -> list[tuple[Tensor, Slot]]:
        """For each of a parameter's moments, the flat tensor that holds it and its slot there."""
        if self.layout.rule == "factored":
            return [(self.moments[0], place) for place in self.layout.factors[slot]]
        return [(moment, self.layout.slots[slot]) for moment in self.moments]

    def read_moment(self, number: int, slot: int) -> Tensor:
        """One of a parameter's moments in the master's dtype: a view if it is stored exactly, else a copy."""
        moment, place = self.moment_places(slot)[number]
        if moment.dtype == self.layout.master_dtype:
            return moment.narrow(0, place.offset, place.numel).view(place.shape)
        cut = moment[stored_at(moment.dtype, slice(place.offset, place.offset + place.numel))]
        values = widened(cut, place.numel, self.layout.master_dtype, squares=number == SQUARES)
        return values.view(place.shape)

    def write_moment(self, number: int, slot: int, values: Tensor) -> None:
        """Sets one of a parameter's moments."""
        moment, place = self.moment_places(slot)[number]
        cut = moment[stored_at(moment.dtype, slice(place.offset, place.offset + place.numel))]
        narrow(values.to(cut.device).reshape(-1), cut, squares=number == SQUARES)

    def read_region(self, region: Region) -> Tensor:
        """The masters of a region, whose offsets count elements of this state."""
        weights = region.of(self.weights)
        if self.rest is None:
            return weights.to(self.layout.master_dtype)
        rest = region.of(self.rest)
        if not self.layout.splits:
            return rest
        return join(SplitPair(weights.to(rest.device).contiguous(), rest.contiguous()))

    def write_region(self, region: Region, inside: Inside, values: Tensor) -> None:
        """Sets the masters of a part of a region."""
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
        """Copies the values of `other`, the same chunk's state in another place."""
        self.weights.copy_(other.weights)
        for target, source in zip(self.beside_weights, other.beside_weights, strict=True):
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

    @property
    def beside_weights(self) -> tuple[Tensor, ...]:
        return self.moments if self.rest is None else (self.rest, *self.moments)

    def part(self, elements: Range) -> StateSlice:
        """The slice to update; of factored moments, the factors of the range's parameter."""
        cut, state = slice(elements.start, elements.end), StateSlice(self.weights, self.rest, self.moments)
        if self.layout.rule != "factored":
            return state.cut(cut)
        slot = next(i for i, s in enumerate(self.layout.slots) if s.offset == elements.start and s.numel)
        return state.with_moments(cut, tuple(self.read_moment(n, slot) for n in range(len(self.layout.factors[slot]))))

    @property
    def gradient(self) -> Tensor:
        """The gradient to update with: the sum if gradients were added up, else the held one."""
        found = self.total if self.added else self.held
        assert found is not None
        return found

    def ranges(self, schedule: Schedule, *, counts: bool = True) -> list[Range]:
        """The ranges to update, merging neighbours with equal hyper-parameters; masters that are rounded never merge,
        because every parameter has a key of its own. With `counts`, this is one more step of each parameter."""
        found: list[list[Any]] = []  # start, end, hyper, first and shape of each
        joins, together = False, max((unit(moment.dtype) for moment in self.moments), default=1)
        asked = [slot for slot in range(len(self.layout.slots)) if slot in self.present]
        hypers = schedule([(self.layout.slots[slot].name, self.steps[slot] + 1) for slot in asked])
        hyper_of = dict(zip(asked, hypers, strict=True))
        for slot, place in self.layout.in_order:
            hyper, numel = hyper_of.get(slot), place.numel
            if hyper is None:
                joins = False
                continue
            self.steps[slot] += counts  # of every parameter on every process, even where its shard is empty
            if numel == 0:
                continue
            end = min(place.offset + -(-numel // together) * together, self.layout.numel)
            if joins and (hyper is found[-1][2] or hyper == found[-1][2]):
                found[-1][1], found[-1][3] = end, 0
            else:
                shape = place.shape if self.layout.is_whole else None
                found.append([place.offset, end, hyper, self.firsts[slot] if self.firsts else 0, shape])
            joins = not self.layout.is_whole
        return [Range(*one) for one in found]

    def call_off(self) -> None:
        """Drops the update that was begun early: the step will not ask for it."""
        if self.early is not None:
            self.early.is_wanted = False
            self.early = None

    def exchange(self) -> None:
        """Swaps the state and the spare."""
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
