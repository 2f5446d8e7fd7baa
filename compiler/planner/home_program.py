"""The integer program of homes: how many chunks of each kind go where, and how many blocks are recomputed.

Chunks that are alike form a class. For each class and home the clock runs one such chunk, alone with the program's
compute, which tells how long the chunk keeps each resource busy and by how much it lengthens the step: the part that
does not overlap. The format of its training state tells the bytes on the device and on the host. Within the room of
both, HiGHS minimises the busy time of the busiest resource. The integer program ignores order, so it is solved under
several assumptions about how well resources can be kept busy, and the clock picks the fastest answer by running whole
programs.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np

from ...passes.program.plan import Plan
from ...runtime.isa.homes import Home, Homes, Where
from ...runtime.isa.instructions import REDUCE
from ...runtime.isa.layout import ChunkLayout
from .linear import Columns, Rows, Terms
from .memory import Memory
from .simulate import DEVICE, HOST, StepTime
from .timeline import ABOUT_CHUNKS, Carrier, Timed, Timeline, Transfer

SPARING = 1e-3
"""The cost of a busy second of any resource, relative to a second of the step: among equally fast answers, the one that
leaves the most room for what is not modelled wins."""

AHEAD = 3
"""The growth of the program's peak with the number of chunks whose weights come and go, counted from the last chunk
back, is modelled in this many steps: the first chunk, the second, and all others together."""

LACKING = 1e3
"""The cost of a host that lacks as much memory as it has: more than any time."""

UP, DOWN, NETWORK = (carrier.value for carrier in Carrier)


@dataclass(frozen=True)
class Assumed:
    """Factors on the busy time of the host's updates and of the bus, which begin late and wait for each other."""

    host: float
    bus: float

    def factor(self, resource: str) -> float:
        return {HOST: self.host, UP: self.bus, DOWN: self.bus}.get(resource, 1.0)


FIRST_LOOK = (Assumed(1.15, 1.3),)
"""For plans that are only compared with others."""

ASSUMED = (*FIRST_LOOK, Assumed(1.0, 1.15), Assumed(1.3, 1.3), Assumed(1.15, 1.6), Assumed(1.3, 1.6), Assumed(1.6, 1.6))
"""For the plan that is taken. On OPT-2.7B x 8, OPT-6.7B x 8 and Llama-8B x 4 in 24 GiB, in either mode, the fastest
answers are among these."""


@dataclass(frozen=True)
class Choice:
    """A class of chunks at one of its possible homes, with the bytes and busy seconds of one chunk.

    Fields:
        buffer_bytes: device buffers for streaming and for gradients that wait; chunks of one dtype share them.
        is_passing: whether the weights are on the device only while they are used.
        busy_s: seconds by resource.
    """

    chunks: tuple[ChunkLayout, ...]
    home: Home
    device_bytes: int
    host_bytes: int
    buffer_bytes: int
    is_passing: bool
    busy_s: dict[str, float]


@dataclass(frozen=True)
class Blocks:
    """The number of blocks that the lowered program recomputes, and what changes for each one that is not: more device
    bytes, before the first complete gradient and from it on, and fewer seconds."""

    count: int = 0
    before_bytes: float = 0.0
    after_bytes: float = 0.0
    seconds: float = 0.0


NOT_CHOSEN = Blocks()
"""Leaves the number of recomputed blocks as it is in the lowered program."""


@dataclass(frozen=True)
class Answer:
    """Homes, the number of blocks that are not recomputed, and a lower bound for the seconds of a step."""

    homes: Homes
    kept: int
    step_s: float


class HomeProgram:
    """The integer program for one lowered program. `begin` are the homes of the chunks before any choice, as the policy
    or the training so far gives them; if `is_placed`, their states stay where they are."""

    def __init__(self, plan: Plan, memory: Memory, time: StepTime, begin: Homes, is_placed: bool) -> None:
        self.plan, self.memory, self.time, self.begin, self.is_placed = plan, memory, time, begin, is_placed
        self.runs = plan.format.accumulate

    def solve(self, assumed: Assumed, blocks: Blocks = NOT_CHOSEN, spare_bytes: int = 0) -> Answer | None:
        """Solves with `spare_bytes` of the device left free. None where that does not fit the device."""
        rows = Rows()
        chosen = rows.columns([len(one.chunks) for one in self.choices], integer=True)
        kept, (step, lacking) = rows.columns([blocks.count], integer=True), (rows.columns([inf]), rows.columns([inf]))
        for chunks in self.classes:
            of_class = chosen.of(float(one.chunks is chunks) for one in self.choices)
            rows.add(of_class, most=len(chunks), least=len(chunks))
        self._within_device(rows, chosen, kept, blocks, spare_bytes)
        self._within_host(rows, chosen, lacking)
        unit_s = self._unit_s
        for row in self._resources(assumed):
            kept_s = blocks.seconds * self.runs * (row.resource == DEVICE)
            terms = chosen.of(seconds / unit_s for seconds in row.seconds) | kept.of([-kept_s / unit_s])
            rows.add(terms | step.of([-1.0]), most=-row.always_s / unit_s)
        sparing = chosen.of(SPARING * sum(one.busy_s.values()) / unit_s for one in self.choices)
        found = rows.minimise(sparing | step.of([1.0]) | lacking.of([LACKING]))
        if found is None:
            return None
        counts = [round(count) for count in chosen.values(found)]
        return Answer(self._placed(counts), round(kept.values(found)[0]), step.values(found)[0] * unit_s)

    @cached_property
    def _unit_s(self) -> float:
        """Roughly the seconds of a step, as the unit: solvers work best with numbers near 1."""
        return (
            self.time.program.compute_s * self.runs
            + sum(len(one.chunks) * max(one.busy_s.values(), default=0.0) for one in self.choices)
            or 1.0
        )

    def _placed(self, counts: list[int]) -> Homes:
        """Assigns the counts of homes to the chunks of each class. The first chunks get the device, since their
        gradients come last and their weights are read first. Chunks on the host and streamed ones alternate. Among
        chunks that live in the same place, those with resident weights come first."""
        found = list(self.begin)
        for chunks in self.classes:
            mine = [(one.home, count) for one, count in zip(self.choices, counts, strict=True) if one.chunks is chunks]
            homes = [home for home, count in mine for _ in range(count)]
            on_device, streamed, on_host = (
                sorted((home for home in homes if home.where is where), key=lambda home: not home.resident)
                for where in (Where.DEVICE, Where.STREAMED, Where.HOST)
            )
            for chunk, home in zip(chunks, [*on_device, *_mixed(on_host, streamed)], strict=True):
                found[chunk.index] = home
        return tuple(found)

    def over(self, answer: Answer, blocks: Blocks) -> int:
        """By how many bytes an answer exceeds the device after all; negative where it fits."""
        budget_bytes = self.memory.limits.device_bytes
        if budget_bytes is None:
            return 0
        static_bytes = self.memory.limits.reserve_bytes + self.memory.holes() + self.memory.static(answer.homes)
        kept = (blocks.before_bytes * answer.kept, blocks.after_bytes * answer.kept)
        high = max(map(sum, zip(self.memory.highest_parts(answer.homes), kept, strict=True)))
        return int(static_bytes + high) - budget_bytes

    # -- what chunks take ----------------------------------------------------------------------------------

    @cached_property
    def classes(self) -> list[tuple[ChunkLayout, ...]]:
        """Chunks that are alike, have the same home to begin with, and are used in the same way."""
        found: dict[object, list[ChunkLayout]] = {}
        for chunk, home in self.plan.placed(self.begin):
            uses = tuple(target for _, target, _ in self._uses[chunk.index])
            key = replace(chunk, index=0, slots=()), home, uses
            found.setdefault(key, []).append(chunk)
        return [tuple(chunks) for chunks in found.values()]

    @cached_property
    def _uses(self) -> dict[int, list[Timed]]:
        """The instructions about each chunk."""
        found: dict[int, list[Timed]] = defaultdict(list)
        for instruction in self.time.program.timed:
            _, target, about = instruction
            if target in ABOUT_CHUNKS and not isinstance(about, Transfer):
                found[about].append(instruction)
        return found

    @cached_property
    def choices(self) -> list[Choice]:
        return [self._choice(chunks, home) for chunks in self.classes for home in self._homes(chunks[0])]

    def _homes(self, chunk: ChunkLayout) -> Iterator[Home]:
        """The homes to choose from; only the initial home, unless the policy is "auto"."""
        begin, plan = self.begin[chunk.index], self.plan
        if plan.request.policy != "auto":
            yield begin
            return
        for where in [begin.where] if self.is_placed else list(Where):
            if where is not begin.where and where not in plan.format.wheres(chunk):
                continue
            may_stay = plan.request.zero != 3 or chunk.shards == 1
            yield from (replace(begin, where=where, resident=stays) for stays in (True, False)[not may_stay :])

    def _choice(self, chunks: tuple[ChunkLayout, ...], home: Home) -> Choice:
        chunk, format = chunks[len(chunks) // 2], self.plan.format  # neither the first nor the last of the program
        placed = [(chunk, home)]
        return Choice(
            chunks, home,
            device_bytes=format.device_bytes(chunk, home) + format.held_bytes(chunk, home),
            host_bytes=format.host_bytes(chunk, home),
            buffer_bytes=format.stream_bytes(placed) + format.waiting_bytes(placed),
            is_passing=format.passing_bytes(chunk, home) > 0,
            busy_s=self._busy_s(chunk, home),
        )  # fmt: skip

    def _busy_s(self, chunk: ChunkLayout, home: Home) -> dict[str, float]:
        """Busy seconds by resource, with copies as slow as on a bus that is busy in both directions. For the device,
        the seconds by which the chunk lengthens the step, waiting included."""
        rates, program = self.time.rates, self.time.program
        both = rates.both_bytes_per_s
        alone = StepTime(
            Timeline.at(self._uses[chunk.index], program.compute_s),
            replace(rates, up_bytes_per_s=both, down_bytes_per_s=both, passing_bytes_per_s=inf),
        )
        homes = (*self.begin[: chunk.index], home, *self.begin[chunk.index + 1 :])
        timing = alone.timing(self.plan, homes)
        found = dict(timing.busy_s) | {DEVICE: max(0.0, timing.step_s - program.compute_s * self.runs)}
        found[HOST] = found.get(HOST, 0.0) + self._slows_host_s(found)
        return found

    def _slows_host_s(self, busy_s: Mapping[str, float]) -> float:
        """Seconds that copies, which keep both directions of the bus busy for so long, keep the host's worker waiting.
        A torch optimizer's updates run alone."""
        rates = self.time.rates
        slower = rates.both_bytes_per_s / rates.passing_bytes_per_s * self.plan.format.beside
        return (busy_s.get(UP, 0.0) + busy_s.get(DOWN, 0.0)) * slower

    # -- rows ----------------------------------------------------------------------------------------------

    def _within_device(self, rows: Rows, chosen: Columns, kept: Columns, blocks: Blocks, spare_bytes: int) -> None:
        budget_bytes = self.memory.limits.device_bytes
        if budget_bytes is None:
            return
        unit = max(budget_bytes, 1)
        ahead = rows.columns([1] * AHEAD, integer=True)
        passing = chosen.of(float(one.is_passing) for one in self.choices)
        for number in range(AHEAD):  # ahead[number] is 1 where more than `number` chunks pass
            of_all = -float(len(self.plan.layout.chunks))
            rows.add(passing | ahead.of(of_all * (i == number) for i in range(AHEAD)), most=number)
        buffers = self._buffers(rows, chosen, unit)
        state = chosen.of(one.device_bytes / unit for one in self.choices)
        for high, kept_bytes in zip(self._highest(), (blocks.before_bytes, blocks.after_bytes), strict=True):
            base, *more = high
            left_bytes = budget_bytes - spare_bytes - self.memory.beside_states - base
            terms = state | buffers | ahead.of(size / unit for size in more) | kept.of([kept_bytes / unit])
            rows.add(terms, most=left_bytes / unit)

    def _buffers(self, rows: Rows, chosen: Columns, unit: int) -> Terms:
        """Room for the buffers of streamed states: for each dtype, those of the longest chunk that is streamed."""
        kinds = list(dict.fromkeys(one.chunks[0].dtype for one in self.choices if one.buffer_bytes))
        room = rows.columns([inf] * len(kinds))
        for number, one in enumerate(self.choices):
            if one.buffer_bytes:
                some = rows.columns([1], integer=True)
                rows.add({chosen.first + number: 1.0} | some.of([-len(one.chunks)]), most=0)
                of_kind = room.of(-float(kind is one.chunks[0].dtype) for kind in kinds)
                rows.add(some.of([one.buffer_bytes / unit]) | of_kind, most=0)
        return room.of(1.0 for _ in kinds)

    def _highest(self) -> tuple[list[int], list[int]]:
        """The peak before the first complete gradient and from it on, without the states: with all weights resident
        that may be, then what a first chunk whose weights come and go adds, what a second, and what all others add."""
        count = len(self.plan.layout.chunks)
        stays, passes = list(self.begin), list(self.begin)
        for one in self.choices:
            for chunk in one.chunks:
                (passes if one.is_passing else stays)[chunk.index] = one.home
        tried = (tuple(stays[: count - passing] + passes[count - passing :]) for passing in (*range(AHEAD), count))
        highest = np.array([self.memory.highest_parts(homes) for homes in tried])
        before, after = np.maximum(0, np.diff(highest, axis=0, prepend=0)).T.tolist()
        return before, after

    def _within_host(self, rows: Rows, chosen: Columns, lacking: Columns) -> None:
        """Keeps within the host as far as possible: `lacking` is the shortfall, as a share of the host's memory."""
        memory = self.memory
        unit = max(memory.limits.host_bytes, 1)
        shared_bytes = self.plan.format.staging_bytes([(chunk, Home()) for chunk in self.plan.layout.chunks])
        terms = chosen.of(one.host_bytes / unit for one in self.choices)
        left_bytes = memory.limits.host_bytes - memory.liveness.offloaded_bytes - shared_bytes
        rows.add(terms | lacking.of([-1.0]), most=left_bytes / unit)

    def _resources(self, assumed: Assumed) -> Iterator["_Row"]:
        """One row for each resource that may bound the step: the seconds that each choice keeps it busy."""
        rates, program, format = self.time.rates, self.time.program, self.plan.format
        busy = {name: np.array([one.busy_s.get(name, 0.0) for one in self.choices]) * assumed.factor(name)
                for name in (DEVICE, HOST, UP, DOWN, NETWORK)}  # fmt: skip
        always = {name: seconds * assumed.factor(name) for name, seconds in self._always_s.items()}
        yield _Row(DEVICE, busy[DEVICE], always[DEVICE])
        if not rates.overlaps:
            return
        serial = busy[HOST] * (not format.beside)  # a torch optimizer's updates run alone
        for name, other, alone in ((UP, DOWN, rates.up_bytes_per_s), (DOWN, UP, rates.down_bytes_per_s)):
            share = rates.both_bytes_per_s / alone  # what a copy takes alone, of its seconds beside the other direction
            yield _Row(name, share * busy[name] + (1 - share) * busy[other] + serial,
                       share * always[name] + (1 - share) * always[other])  # fmt: skip
        yield _Row(NETWORK, busy[NETWORK], always[NETWORK])
        # Updates that begin at step() overlap only with the next forward.
        behind_s = 0.0 if format.in_backward or not format.beside else program.compute_s * self.runs - self._forward_s
        yield _Row(HOST, busy[HOST], behind_s + always[HOST])
        is_streamed = np.array([one.home.streamed for one in self.choices])
        yield _Row(UP, np.maximum(busy[UP], busy[DOWN]) * is_streamed, behind_s)

    @cached_property
    def _always_s(self) -> dict[str, float]:
        """Busy seconds of each resource that do not depend on where chunks are."""
        rates, found = self.time.rates, {DEVICE: self.time.program.compute_s, UP: 0.0, DOWN: 0.0, NETWORK: 0.0}
        for _, _, about in self.time.program.instructions:
            if isinstance(about, Transfer):
                is_exchange = about.carrier is Carrier.NETWORK
                copy_s = about.num_bytes / rates.both_bytes_per_s
                found[about.carrier.value] += rates.exchange_s(about.count, about.num_bytes) if is_exchange else copy_s
        found[HOST] = self._slows_host_s(found)
        return {name: seconds * self.runs for name, seconds in found.items()}

    @property
    def _forward_s(self) -> float:
        """Seconds of compute up to the first complete gradient."""
        program = self.time.program
        return next((at_s for at_s, target, _ in program.timed if target is REDUCE), program.compute_s)


@dataclass(frozen=True)
class _Row:
    """A resource: busy seconds by choice (one element each), and those that no choice changes."""

    resource: str
    seconds: np.ndarray
    always_s: float


def _mixed(one: list[Home], other: list[Home]) -> list[Home]:
    """Merges both lists, each in its order and evenly spread."""
    places = [*((i + 0.5) / len(one) for i in range(len(one))), *((i + 0.5) / len(other) for i in range(len(other)))]
    return [home for _, home in sorted(zip(places, [*one, *other], strict=True), key=lambda pair: pair[0])]
