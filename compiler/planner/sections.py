"""Divides a lowered program's costs at its blocks, and joins such sections to those of a program with more blocks.

A section is what one sweep (a forward or a backward) holds of one block, up to the next one's beginning; the first one
begins with the program. It refers to chunks and transfers by how many blocks they are away, so that equal blocks have
equal sections::

    blocks of the program     0        1        2        2        1        0
    forward, then backward    F.first  F        F.last   B.last   B        B.first
    joined for five           F.first  F  F  F  F.last   B.last   B  B  B  B.first
"""

from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from ...passes.program.plan import Plan
from ...passes.program.program import Program, note
from ...passes.splitting.parts import block_finder
from ...runtime.isa.layout import Layout
from ..rates.rates import Rates
from .liveness import Interval, Liveness
from .timeline import ABOUT_CHUNKS, Event, Timeline, Transfer, events, laid_out


class NotRepeatedError(Exception):
    """The program does not consist of one section per block and sweep, or equal blocks have different sections."""


@dataclass(frozen=True)
class Place:
    """A block of one sweep: both are numbered from 0 on."""

    sweep: int
    block: int

    def seen_from(self, other: "Place") -> "Place":
        """The same sweep, and how many blocks further than `other`'s."""
        return Place(self.sweep, self.block - other.block)

    def back_from(self, other: "Place") -> "Place":
        """The inverse of `seen_from`."""
        return Place(self.sweep, self.block + other.block)


@dataclass(frozen=True)
class ChunkName:
    """A chunk by one of its parameters: how many blocks further on its block is (None: in none), and its name there."""

    further: int | None
    name: str


class ChunkNames:
    """Names a layout's chunks as a section sees them: by their first parameter in the block that is nearest to it."""

    def __init__(self, layout: Layout, blocks: tuple[str, ...]) -> None:
        block_of, numbers = block_finder(blocks), {block: number for number, block in enumerate(blocks)}
        self._first: list[dict[int | None, str]] = []
        self._index: dict[tuple[int | None, str], int] = {}
        for index, chunk in enumerate(layout.chunks):
            first: dict[int | None, str] = {}
            for slot in chunk.slots:
                block = block_of(slot.name)
                name = slot.name.removeprefix(block)
                first.setdefault(numbers.get(block), name)
                self._index[numbers.get(block), name] = index
            self._first.append(first)

    def of(self, index: int, place: Place) -> ChunkName:
        first = self._first[index]
        blocks = [block for block in first if block is not None]
        if not blocks:
            return ChunkName(None, first[None])
        nearest = min(blocks, key=lambda block: abs(block - place.block))
        return ChunkName(nearest - place.block, first[nearest])

    def index(self, name: ChunkName, place: Place) -> int:
        return self._index[None if name.further is None else place.block + name.further, name.name]


@dataclass(frozen=True)
class Section:
    """What one sweep holds of one block.

    Fields:
        changes: by category of `Liveness.values`, and then on the host, by how many bytes each position changes them.
        largest_bytes: the largest storage made in it.
        starts, ends: the position and the chunk of each fetch that starts, and of each that ends in it.
        events: for the timeline. Transfers that it starts are numbered from 0 on; what waits for one names the place
            of the section that started it, and the number there.
    """

    changes: tuple[tuple[int, ...], ...]
    largest_bytes: int
    starts: tuple[tuple[int, ChunkName], ...]
    ends: tuple[tuple[int, ChunkName], ...]
    events: tuple[Any, ...]

    @property
    def length(self) -> int:
        return len(self.changes[0])


def sections(program: Program, live: Liveness, plan: Plan, rates: Rates,
             blocks: tuple[str, ...]) -> dict[Place, Section]:  # fmt: skip
    """The sections of a lowered program, in its order. Raises NotRepeatedError where it has no such sections."""
    begins = _begins(program, blocks)
    places, positions = list(begins), [0, *list(begins.values())[1:]]
    _check_readers(program, places, positions, blocks)
    bounds = list(zip(positions, [*positions[1:], live.length], strict=True))
    names = ChunkNames(plan.layout, blocks)
    rows = np.diff([*live.values.values(), live.on_host], prepend=0)
    starts, ends = (defaultdict[Place, list[tuple[int, ChunkName]]](list) for _ in range(2))
    for fetch in live.fetches:
        for found, position in ((starts, fetch.start), (ends, fetch.end)):
            index = bisect(positions, position) - 1
            place = places[index]
            found[place].append((position - positions[index], names.of(fetch.chunk, place)))
    followed = _events(program, plan, rates, places, positions, names)
    return {
        place: Section(
            tuple(map(tuple, rows[:, begin:end].tolist())), int(live.largest[begin:end].max(initial=0)),
            tuple(sorted(starts[place], key=lambda one: one[0])), tuple(sorted(ends[place], key=lambda one: one[0])),
            tuple(followed[place]),
        )
        for place, (begin, end) in zip(places, bounds, strict=True)
    }  # fmt: skip


def _begins(program: Program, blocks: tuple[str, ...]) -> dict[Place, int]:
    """Where each section begins: at the first node of its block in its sweep. The last nodes of the block before may
    come later."""
    block_of, numbers = block_finder(blocks), {block: number for number, block in enumerate(blocks)}
    begins: dict[tuple[str, int], int] = {}
    for position, node in enumerate(program.nodes):
        block = block_of(note(node).module) if node.op.startswith("call") else ""
        if block:
            here = note(node).sweep, numbers[block]
            begins.setdefault(here, position)
            sweep, number = next(reversed(begins))
            if sweep != here[0] or abs(number - here[1]) > 1:
                raise NotRepeatedError(f"{node} of block {here[1]} is in the {sweep} of block {number}")
    sweeps = list(dict.fromkeys(sweep for sweep, _ in begins))
    for sweep in sweeps:
        order = [number for each, number in begins if each == sweep]
        if order not in (list(range(len(blocks))), list(reversed(range(len(blocks))))):
            raise NotRepeatedError(f"the blocks of {sweep} are in the order {order}")
    return {Place(sweeps.index(sweep), number): position for (sweep, number), position in begins.items()}


def _check_readers(program: Program, places: list[Place], positions: list[int], blocks: tuple[str, ...]) -> None:
    """Raises NotRepeatedError where blocks far away decide how long a value lives.

    A block's value is read in the block and in those next to it; chunks are told apart by the layout. A value that all
    blocks share, such as a mask, is made outside of them or by the first one, and read again in a later sweep by all
    that read it or by none: if only those did that are recomputed, how long it lives would depend on which these are.
    """
    block_of, order = block_finder(blocks), program.positions()
    inside = {node: bool(block_of(note(node).module)) for node in program.computes}
    place_of = {node: places[max(bisect(positions, order[node]) - 1, 0)] for node in inside}
    for node, place in place_of.items():
        if note(node).chunk is not None:
            continue
        readers = [user for user in node.users if user in place_of]
        far = [user for user in readers if abs(place_of[user].block - place.block) > 1]
        if inside[node] and far and not (place == places[0] and all(inside[user] for user in far)):
            raise NotRepeatedError(f"{node} of block {place.block} is read more than a block away")
        if far:
            reads = {place_of[user] for user in readers if inside[user]}
            again = {reader.block for reader in reads if reader.sweep > place.sweep}
            if again and again != {reader.block for reader in reads}:
                raise NotRepeatedError(f"{node} is read again by some of the blocks that read it, and not by others")


def _events(program: Program, plan: Plan, rates: Rates, places: list[Place], positions: list[int],
            names: ChunkNames) -> dict[Place, list[object]]:  # fmt: skip
    order, found = program.positions(), defaultdict[Place, list[object]](list)
    begun: dict[int, tuple[Place, int]] = {}
    started = defaultdict[Place, count](count)
    for node, event in events(program, plan, rates):
        place = places[bisect(positions, order[node]) - 1]
        told: object = event
        if isinstance(event, tuple):
            target, about = event
            if isinstance(about, Transfer):
                begun[about.number] = place, next(started[place])
                told = target, replace(about, number=begun[about.number][1])
            elif target in ABOUT_CHUNKS:
                told = target, names.of(about, place)
            else:
                where, number = begun[about]
                told = target, where.seen_from(place), number
        found[place].append(told)
    return found


def joined(found: Iterable[tuple[Place, Section]], like: Liveness, static_bytes: int, layout: Layout,
           blocks: tuple[str, ...], rates: Rates) -> tuple[Liveness, Timeline]:  # fmt: skip
    """The liveness, with the categories of `like`, and the timeline of a program of these sections in this order."""
    parts = list(found)
    names = ChunkNames(layout, blocks)
    starts, ends = (defaultdict[int, list[int]](list) for _ in range(2))
    position = 0
    for place, section in parts:
        for of_chunk, here in ((starts, section.starts), (ends, section.ends)):
            for at, name in here:
                of_chunk[names.index(name, place)].append(position + at)
        position += section.length
    fetches = [
        Interval(chunk, *span) for chunk, begun in starts.items() for span in zip(begun, ends[chunk], strict=True)
    ]
    fetches.sort(key=lambda fetch: fetch.start)
    changes = np.concatenate([np.array(section.changes, np.int64) for _, section in parts], axis=1)
    *values, on_host = changes.cumsum(axis=1)
    largest = np.array([section.largest_bytes for _, section in parts], np.int64)
    live = Liveness(
        dict(zip(like.values, values, strict=True)), tuple(fetches), static_bytes, position, largest, on_host
    )
    return live, laid_out(_renumbered(parts, names), rates.launch_s)


def _renumbered(parts: list[tuple[Place, Section]], names: ChunkNames) -> Iterable[Event]:
    """The events of all sections, with the indices of chunks and with transfers that are numbered throughout."""
    numbers, begun = count(), dict[tuple[Place, int], int]()
    for place, section in parts:
        for event in section.events:
            if not isinstance(event, tuple):
                yield event
                continue
            target, about, *number = event
            if isinstance(about, Transfer):
                begun[place, about.number] = next(numbers)
                yield target, replace(about, number=begun[place, about.number])
            elif isinstance(about, ChunkName):
                yield target, names.index(about, place)
            else:
                yield target, begun[about.back_from(place), number[0]]
