"""What a plan costs in time: its program runs a few steps on a clock, with seconds in place of tensors.

Only differences between plans count, so the clock is coarse: operators take the time of their FLOP, copies that of
their bytes, and what ranks exchange takes none. It is exact about who waits for whom, since that decides how much of
copies and updates hides behind compute: gradients are complete one after the other, the host updates one chunk at a
time, and the next forward begins with the chunk whose gradient came last.
"""

import heapq
from collections import deque

from torch import fx

from ..passes.plan import Plan, Residency
from ..passes.program import Program
from ..runtime.layout import STREAMED_GRADIENTS, ChunkLayout
from ..runtime.ops import FETCH, REDUCE, WAIT
from .cost import LAUNCH_S, Rates, flops

STEPS = 4
"""Steps on the clock. The last counts: what one leaves to be done delays the next."""


class StepTime:
    """Modelled seconds of one training step of a program, by where its chunks live."""

    def __init__(self, program: Program, rates: Rates) -> None:
        self.rates = rates
        self.compute_s = 0.0
        self.instructions: list[tuple[float, fx.node.Target, int]] = []
        for node in program.computes:
            if node.target in _CHUNK_ARGUMENT:
                chunk = node.args[_CHUNK_ARGUMENT[node.target]]
                self.instructions.append((self.compute_s, node.target, int(chunk)))
            self.compute_s += flops(node) / rates.flops_per_s

    def seconds(self, plan: Plan, residency: Residency) -> float:
        """From the end of one step to the end of the next."""
        clock = _Clock(plan, residency, self.rates)
        ends = [clock.step(self) for _ in range(STEPS)]
        return ends[-1] - ends[-2]


_CHUNK_ARGUMENT = {FETCH: 0, WAIT: 1, REDUCE: 1}


class _Clock:
    """When everybody is done with what there is to do so far: compute (`now`), the bus each way, the host's worker, and
    the states that travel through the device. `fresh` is when each chunk's weights are new where they are read."""

    def __init__(self, plan: Plan, residency: Residency, rates: Rates) -> None:
        self.chunks, self.updates, self.residency, self.rates = plan.layout.chunks, plan.updates, residency, rates
        self.now = self.to_device = self.to_host = self.host = self.travels = 0.0
        self.fresh = dict.fromkeys(range(len(self.chunks)), 0.0)
        self.fetched = dict(self.fresh)
        self.complete: list[tuple[int, float]] = []  # chunks that step() is to update, and when their gradients landed
        self.landing: list[tuple[float, int]] = []  # the worker's, by when their gradients land
        self.landed: list[int] = []
        self.reading: deque[float] = deque()  # when gradients are read that wait on the device for a state to come by

    def step(self, time: StepTime) -> float:
        """Run one step more. Returns when it ends, which is before all of its updates do."""
        passed_s = 0.0
        for at_s, target, index in time.instructions:
            self.now += at_s - passed_s
            passed_s = at_s
            if target is FETCH:
                self.fetched[index] = self.now
            elif target is WAIT:
                self._wait(self.chunks[index])
            elif self.chunks[index].trainable:
                self._reduce(self.chunks[index])
        self.now += time.compute_s - passed_s
        self._end()
        return self.now

    def _wait(self, chunk: ChunkLayout) -> None:
        self._work_until(chunk)
        arrival = self.fresh[chunk.index]
        if not self._stays(chunk):
            arrival = self._copy_to_device(max(arrival, self.fetched[chunk.index]), chunk.shard_bytes)
        self.now = max(self.now, arrival)

    def _reduce(self, chunk: ChunkLayout) -> None:
        if chunk.index in self.residency.masters:
            self.now += chunk.shard_numel / self.rates.device_params_per_s
        elif self.updates and self.updates.at_once and chunk.index in self.residency.streamed:
            self._stream(chunk, self.now)
            self.reading.append(self.travels)
            if len(self.reading) > STREAMED_GRADIENTS:
                self.now = max(self.now, self.reading.popleft())
        else:
            self.to_host = landed = max(self.now, self.to_host) + chunk.shard_bytes / self.rates.bus_bytes_per_s
            self._not_beside(landed)
            if self.updates and self.updates.in_backward:
                heapq.heappush(self.landing, (landed, chunk.index))
            else:
                self.complete.append((chunk.index, landed))

    def _end(self) -> None:
        """The optimizer's step(). A torch optimizer's is over when all is updated."""
        for index, landed in sorted(self.complete):
            chunk = self.chunks[index]
            if self.updates is None:
                self.now = max(self.now, landed) + chunk.numel / self.rates.torch_params_per_s
                self._renew(chunk, self.now)
            elif index in self.residency.streamed:
                self._stream(chunk, max(self.now, landed))
            else:
                heapq.heappush(self.landing, (max(self.now, landed), index))
        self.complete.clear()

    def _work_until(self, chunk: ChunkLayout) -> None:
        """Let the worker go on until it has updated the chunk, if it is to."""
        while chunk.index in self.landed or any(index == chunk.index for _, index in self.landing):
            if not self.landed:
                self.host = max(self.host, self.landing[0][0])
            while self.landing and self.landing[0][0] <= self.host:
                heapq.heappush(self.landed, heapq.heappop(self.landing)[1])
            updated = self.chunks[heapq.heappop(self.landed)]
            self.host += updated.shard_numel / self.rates.host_params_per_s
            self._renew(updated, self.host)

    def _renew(self, chunk: ChunkLayout, at: float) -> None:
        """The chunk is updated, and its weights on the device, where they stay, are so after a copy."""
        resident = chunk.index in self.residency.weights
        self.fresh[chunk.index] = self._copy_to_device(at, chunk.shard_bytes) if resident else at

    def _stream(self, chunk: ChunkLayout, after: float) -> None:
        """Up, update and down, piece by piece, beside the copies of weights and gradients."""
        assert self.updates is not None
        state = self.updates.master_bytes(chunk) + self.updates.moment_bytes(chunk)
        state -= chunk.shard_bytes if self._stays(chunk) else 0
        gradient = 0 if self.updates.at_once else chunk.shard_bytes
        self.now += LAUNCH_S
        self.travels = max(after, self.travels) + (state + gradient) / self.rates.bus_bytes_per_s
        self._not_beside(self.travels)
        self.host += chunk.shard_numel / self.rates.passing_params_per_s
        self.fresh[chunk.index] = self.travels

    def _copy_to_device(self, after: float, num_bytes: int) -> float:
        self.to_device = max(after, self.to_device) + num_bytes / self.rates.bus_bytes_per_s
        self._not_beside(self.to_device)
        return self.to_device

    def _not_beside(self, at: float) -> None:
        """Compute waits for a copy where nothing overlaps."""
        if not self.rates.overlaps:
            self.now = max(self.now, at)

    def _stays(self, chunk: ChunkLayout) -> bool:
        return chunk.index in self.residency.weights | self.residency.masters
