"""Device and host bytes of one program, for any homes of its chunks."""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ...passes.program.estimate import Estimate
from ...passes.program.plan import Plan
from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.homes import Home, Homes
from ..rates.rates import Rates, slowest
from .communication import collective_bytes
from .liveness import GRADIENT_BUFFERS, Liveness


@dataclass(frozen=True)
class Limits:
    """The bytes that a plan must keep to, and how fast the machine is.

    `device_bytes` is the budget (None: no limit), of which `reserve_bytes` go to other things than tensors: the
    driver's context and libraries. `host_bytes` is what this process may hold on its host. `hole_share` is the share of
    a program's largest storage that the device's allocator may lose to holes too small for it; 0 for an allocator that
    cannot fragment, such as the arena.
    """

    device_bytes: int | None
    reserve_bytes: int
    host_bytes: int
    rates: Rates
    hole_share: float = 0.0

    def allow(self, plan: Plan) -> bool:
        """Whether a plan fits both the device and the host."""
        return self.allow_on_device(plan) and plan.estimate.host_bytes <= self.host_bytes

    def allow_on_device(self, plan: Plan) -> bool:
        return self.device_bytes is None or plan.peak_bytes <= self.device_bytes

    def agreed(self, ranks: Ranks) -> "Limits":
        """The limits that every rank can keep to, so that all make the same plan. Gathers the limits of all ranks."""
        found = ranks.gather((self.device_bytes, self.reserve_bytes, self.host_bytes, self.rates))
        budgets, reserves, hosts, rates = zip(*found, strict=True)
        device_bytes = min((budget for budget in budgets if budget is not None), default=None)
        return replace(
            self, device_bytes=device_bytes, reserve_bytes=max(reserves), host_bytes=min(hosts), rates=slowest(rates)
        )


class Memory:
    """What a program takes, given its chunks' homes: throughout, and at its highest point.

    Weights come and go only at certain positions, and of each stretch between two of these only the highest position
    matters. `highest` has that position for each stretch, and arrays have one element per stretch.
    """

    def __init__(self, plan: Plan, liveness: Liveness, limits: Limits) -> None:
        self.plan = plan
        self.format = plan.format
        self.chunks = plan.layout.chunks
        self.liveness = liveness
        self.limits = limits
        self.working_bytes = plan.format.working_bytes(self.chunks)
        fetches, values = liveness.fetches, liveness.total()
        starts, ends = [fetch.start for fetch in fetches], [fetch.end + 1 for fetch in fetches]
        stretches = np.unique([0, *starts, *ends])
        bounds = zip(stretches, [*stretches[1:], len(values)], strict=True)
        self.highest = np.array(
            [begin + values[begin:end].argmax() for begin, end in bounds if begin < len(values)], int
        )
        self.values = values[self.highest]
        self.starts, self.ends = np.searchsorted(stretches, starts), np.searchsorted(stretches, ends)
        self.fetched = np.array([fetch.chunk for fetch in fetches], dtype=np.intp)
        self.stretches_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for chunk, start, end in zip(self.fetched, self.starts, self.ends, strict=True):
            self.stretches_of[int(chunk)].append((int(start), int(end)))
        # Homes are tried by the thousand, and most chunks have the same home as in the previous try.
        self._there_bytes = cache(self._there)
        self._passing_bytes = cache(self._passing)
        self._streaming_bytes = cache(self._streaming)

    # -- device --------------------------------------------------------------------------------------------

    def fits(self, homes: Homes) -> bool:
        return self.limits.device_bytes is None or self.peak(homes) <= self.limits.device_bytes

    def peak(self, homes: Homes) -> int:
        tensors = self.static(homes) + int(self.timeline(homes).max(initial=0))
        return self.limits.reserve_bytes + self.holes() + tensors

    def holes(self) -> int:
        """Bytes that are free in the allocator, but not in one piece, where the largest storage needs one."""
        return int(self.limits.hole_share * self.liveness.largest_bytes)

    def static(self, homes: Homes) -> int:
        per_chunk = map(self._there_bytes, range(len(homes)), homes)
        return self._always_bytes + sum(per_chunk) + self.streaming(homes)

    @property
    def _always_bytes(self) -> int:
        return self.liveness.static_bytes + self.working_bytes + collective_bytes(self.plan)

    @property
    def beside_states(self) -> int:
        """Bytes that stay allocated wherever chunks are."""
        return self.limits.reserve_bytes + self.holes() + self._always_bytes

    def highest_parts(self, homes: Homes) -> tuple[int, int]:
        """The highest points of the timeline before the first gradient exists, and from then on."""
        timeline = self.timeline(homes)
        gradients = self.liveness.values.get(GRADIENT_BUFFERS, np.zeros(self.liveness.length))[self.highest]
        first = int((gradients > 0).argmax()) if gradients.any() else len(timeline)
        return int(timeline[:first].max(initial=0)), int(timeline[first:].max(initial=0))

    def streaming(self, homes: Homes) -> int:
        """Bytes of the buffers for streamed training states, and of gradients that wait for theirs."""
        return self._streaming_bytes(tuple((index, home) for index, home in enumerate(homes) if home.streamed))

    def timeline(self, homes: Homes) -> np.ndarray:
        return self.values + self.in_flight(homes)

    def in_flight(self, homes: Homes) -> np.ndarray:
        """Bytes of weights that are on the device only while they are used, by stretch."""
        passing = np.fromiter(map(self._passing_bytes, range(len(homes)), homes), np.int64, len(homes))[self.fetched]
        changes = np.zeros(len(self.highest) + 1, dtype=np.int64)
        np.add.at(changes, self.starts, passing)
        np.subtract.at(changes, self.ends, passing)
        return changes.cumsum()[:-1]

    def _there(self, index: int, home: Home) -> int:
        chunk = self.chunks[index]
        return self.format.device_bytes(chunk, home) + self.format.held_bytes(chunk, home)

    def _passing(self, index: int, home: Home) -> int:
        return self.format.passing_bytes(self.chunks[index], home)

    def _streaming(self, streamed: tuple[tuple[int, Home], ...]) -> int:
        placed = [(self.chunks[index], home) for index, home in streamed]
        return self.format.stream_bytes(placed) + self.format.waiting_bytes(placed)

    # -- host ----------------------------------------------------------------------------------------------

    def host(self, homes: Homes) -> int:
        placed = self.plan.placed(homes)
        state = sum(self.format.host_bytes(*one) for one in placed) + self.format.staging_bytes(placed)
        return state + self.liveness.offloaded_bytes

    def beyond_host(self, homes: Homes) -> int:
        """Bytes by which the homes exceed the host's memory."""
        return max(0, self.host(homes) - self.limits.host_bytes)

    # -- reports -------------------------------------------------------------------------------------------

    def estimate(self, homes: Homes) -> Estimate:
        """The bytes of an estimate; the search adds time and collectives."""
        timeline = self.timeline(homes)
        at = int(timeline.argmax()) if len(timeline) else 0
        on_device = [(chunk, home) for chunk, home in self.plan.placed(homes) if home.on_device]
        state = sum(self.format.state_bytes(chunk) for chunk, _ in on_device)
        there = sum(self.format.device_bytes(chunk, home) for chunk, home in self.plan.placed(homes))
        parts = {
            "training state": state + sum(self.format.held_bytes(*one) for one in on_device),
            "resident weights": there - state,
            "being exchanged": collective_bytes(self.plan),
            "states on their way": self.streaming(homes),
            "updates of whole parameters": self.working_bytes,
            "inputs and buffers": self.liveness.static_bytes,
            "weights in flight": int(self.in_flight(homes)[at]) if len(timeline) else 0,
            "driver and libraries": self.limits.reserve_bytes,
            "holes in the allocator": self.holes(),
            **{name: int(array[self.highest[at]]) for name, array in self.liveness.values.items() if len(array)},
        }
        largest = sorted(((name, n) for name, n in parts.items() if n), key=lambda part: -part[1])
        return Estimate(
            static_bytes=self.static(homes),
            peak_bytes=self.peak(homes),
            reserve_bytes=self.limits.reserve_bytes,
            at_peak=tuple(largest),
            host_bytes=self.host(homes),
            offloaded_bytes=self.liveness.offloaded_bytes,
        )


class Filling:
    """Homes that are changed one chunk at a time: trying a move costs what it changes, not a full recount."""

    def __init__(self, memory: Memory, homes: Homes) -> None:
        self.memory, self.homes = memory, list(homes)
        self.static_bytes, self.timeline = memory.static(homes), memory.timeline(homes)

    def move(self, index: int, home: Home) -> None:
        """Moves a chunk to another home if that fits."""
        memory, before = self.memory, self.homes[index]
        more_bytes = memory._there_bytes(index, home) - memory._there_bytes(index, before)
        if before.streamed or home.streamed:
            after = (*self.homes[:index], home, *self.homes[index + 1 :])
            more_bytes += memory.streaming(after) - memory.streaming(tuple(self.homes))
        timeline = self.timeline
        if passing_bytes := memory._passing_bytes(index, home) - memory._passing_bytes(index, before):
            timeline = timeline.copy()
            for start, end in memory.stretches_of[index]:
                timeline[start:end] += passing_bytes
        limits, high_bytes = memory.limits, int(timeline.max(initial=0))
        taken_bytes = limits.reserve_bytes + memory.holes() + self.static_bytes + more_bytes + high_bytes
        if limits.device_bytes is None or taken_bytes <= limits.device_bytes:
            self.homes[index], self.static_bytes, self.timeline = home, self.static_bytes + more_bytes, timeline
