"""What a plan costs in time: its program runs a few steps on a clock, with seconds in place of tensors.

Only differences between plans count, so the clock is coarse: operators take the time of their FLOP, copies that of
their bytes, and what ranks exchange takes none. What it follows closely is who waits for whom, since that decides how
much of copies and updates hides behind compute: gradients are complete one after the other, the host updates one chunk
at a time, and the next forward begins with the chunk whose gradient came last.
"""

import heapq
from collections.abc import Sequence

from torch import fx

from ...passes.program.plan import Plan
from ...passes.program.program import Program, tensor_type
from ...runtime.isa.formats import STREAMED_GRADIENTS
from ...runtime.isa.homes import Homes
from ...runtime.isa.instructions import ACCUMULATE_GRAD, ARRIVE, DEPART, FETCH, OFFLOAD, REDUCE, RELOAD, WAIT
from ...runtime.isa.layout import ChunkLayout
from .rates import LAUNCH_S, Rates, flops

STEPS = 3
"""Steps on the clock. The last counts: what one leaves to be done delays the next."""

CHUNK_ARGUMENT = {FETCH: 0, WAIT: 1, REDUCE: 1, ACCUMULATE_GRAD: 1}

HOST_ARGUMENT = {DEPART: 1, RELOAD: 0, ARRIVE: 1}

Instruction = tuple[float, fx.node.Target, int]
"""Seconds of compute from the program's beginning up to it, the operator, and the number of its chunk, or of the
activation that goes to the host and back."""

_Job = tuple[int, bool, float]
"""The host worker's: the number of a chunk, whether its update is done then, and seconds."""


class StepTime:
    """Modelled seconds of one training step, by where chunks live: `compute_s` of compute, and instructions between.
    `offloaded` are the bytes of each activation that goes to the host."""

    def __init__(self, instructions: Sequence[Instruction], compute_s: float, rates: Rates,
                 offloaded: Sequence[int] = ()) -> None:  # fmt: skip
        self.instructions = instructions
        self.compute_s = compute_s
        self.rates = rates
        self.offloaded = offloaded

    @classmethod
    def of(cls, program: Program, rates: Rates) -> "StepTime":
        compute_s, instructions = 0.0, list[Instruction]()
        offloads = {node: number for number, node in enumerate(program.calls(OFFLOAD))}
        for node in program.computes:
            if node.target in CHUNK_ARGUMENT:
                instructions.append((compute_s, node.target, int(node.args[CHUNK_ARGUMENT[node.target]])))
            elif node.target in HOST_ARGUMENT:
                instructions.append((compute_s, node.target, offloads[node.args[HOST_ARGUMENT[node.target]]]))
            elif node in offloads:
                instructions.append((compute_s, OFFLOAD, offloads[node]))
            compute_s += flops(node) / rates.flops_per_s
        return cls(instructions, compute_s, rates, [tensor_type(node).num_bytes for node in offloads])

    def seconds(self, plan: Plan, homes: Homes) -> float:
        """From the end of one step to the end of the next: as many runs of the program as gradients are added of."""
        clock = _Clock(plan, homes, self.rates, self.offloaded)
        ends_s = [clock.step(self.instructions, self.compute_s) for _ in range(STEPS)]
        return ends_s[-1] - ends_s[-2]


class _Clock:
    """Whoever has something to do in a step, and when each will be done."""

    def __init__(self, plan: Plan, homes: Homes, rates: Rates, offloaded: Sequence[int] = ()) -> None:
        self.chunks, self.format, self.homes, self.rates = plan.layout.chunks, plan.format, homes, rates
        self.runs = plan.format.accumulate
        self.streamed = [index for index, home in enumerate(homes) if home.streamed]
        self.offloaded = offloaded
        # With all that there is to do so far are done: compute, copies of weights and activations to the device, those
        # of activations to the host, states on their way through the device, the host's worker. Gradients on their way
        # to the host are never more than one.
        self.now_s = self.up_s = self.down_s = self.travel_s = self.host_s = 0.0
        self.moved_s = [0.0] * len(offloaded)  # by activation: when it is where it was copied to last
        # By chunk: when its fetch was reached, its weights are new where they are read, its gradient is on the host.
        self.fetched_s, self.fresh_s, self.landed_s = ([0.0] * len(self.chunks) for _ in range(3))
        self.copied: set[int] = set()  # in this run, for a torch optimizer, of the weights that stay
        self.complete: list[int] = []  # chunks for step() to update
        self.coming: list[tuple[float, _Job]] = []  # the worker's next ones, and from when on; a heap
        self.come: list[_Job] = []  # those of them that it may begin with; a heap
        self.pending: set[int] = set()  # chunks that the worker is to update
        self.reading: list[int] = []  # chunks whose gradients wait on the device for their states to come by

    def step(self, instructions: Sequence[Instruction], compute_s: float) -> float:
        """Run one step more. Returns when it ends, which is before all of its updates do."""
        for run in range(1, self.runs + 1):
            self.copied.clear()
            passed_s = 0.0
            for at_s, target, index in instructions:
                self.now_s += at_s - passed_s
                passed_s = at_s
                if target is FETCH:
                    self.fetched_s[index] = self.now_s
                elif target is WAIT:
                    self._wait(self.chunks[index])
                elif target is REDUCE:
                    self._reduce(self.chunks[index], last=run == self.runs)
                elif target is OFFLOAD:
                    self.moved_s[index] = self.down_s = self._copy(self.offloaded[index], self.now_s, self.down_s)
                elif target is RELOAD:
                    self.moved_s[index] = self.up_s = self._copy(self.offloaded[index], self.now_s, self.up_s)
                elif target in (DEPART, ARRIVE):
                    self.now_s = max(self.now_s, self.moved_s[index])
                else:
                    self._accumulate_grad(index)
            self.now_s += compute_s - passed_s
        self._end()
        return self.now_s

    # -- instructions --------------------------------------------------------------------------------------

    def _wait(self, chunk: ChunkLayout) -> None:
        index = chunk.index
        self._work_until_updated(index)
        arrival_s = self.fresh_s[index]
        home = self.homes[index]
        # Only updates that run beside the program copy weights to where they stay: see `_update_on_host`.
        stale = not self.format.beside and not home.on_device and index not in self.copied
        if not (home.resident or home.on_device) or stale:
            self.copied.add(index)
            arrival_s = self._copy_up(chunk, max(arrival_s, self.fetched_s[index]))
        self.now_s = max(self.now_s, arrival_s)

    def _reduce(self, chunk: ChunkLayout, *, last: bool) -> None:
        """A gradient is complete. `last`: it is not only added to those of runs to come."""
        if self.homes[chunk.index].on_device:
            self.now_s += self._adds * chunk.shard_numel / self.rates.device_sums_per_s
            self.now_s += last * chunk.shard_numel / self.rates.device_params_per_s
        elif self._waits_for_its_state(chunk.index):
            self._stream(chunk, self.now_s)
            self.reading = [*(i for i in self.reading if i != chunk.index), chunk.index]
        else:
            self.landed_s[chunk.index] = self._copied(chunk.shard_bytes, self.now_s)
            if self._adds:
                self._put(chunk, self.landed_s[chunk.index], self.rates.host_sums_per_s)
            if last and self.format.in_backward:
                self._update(chunk, self.landed_s[chunk.index])
            elif last:
                self.complete.append(chunk.index)

    def _accumulate_grad(self, index: int) -> None:
        """The gradient's memory is free again."""
        if self._waits_for_its_state(index):
            while len(self.reading) > STREAMED_GRADIENTS:
                self.now_s = max(self.now_s, self.fresh_s[self.reading.pop(0)])
        else:
            self.now_s = max(self.now_s, self.landed_s[index])

    def _end(self) -> None:
        """The optimizer's step(), in the order of the next forward. A torch optimizer's ends with the last update."""
        for chunk in (self.chunks[index] for index in sorted(self.complete)):
            if not self.format.beside:
                self.now_s += chunk.numel / self.rates.torch_params_per_s
                self.fresh_s[chunk.index] = self.now_s
            else:
                self._update(chunk, self.now_s)
        self.complete.clear()

    # -- updates and copies --------------------------------------------------------------------------------

    def _waits_for_its_state(self, index: int) -> bool:
        return self.format.at_once and self.homes[index].streamed

    @property
    def _adds(self) -> bool:
        """Whether each gradient is added to the others of its step."""
        return self.format.beside and self.runs > 1

    def _put(self, chunk: ChunkLayout, after_s: float, elements_per_s: float, updates: bool = False) -> None:
        """Give the worker something to do with a chunk."""
        heapq.heappush(self.coming, (after_s, (chunk.index, updates, chunk.shard_numel / elements_per_s)))

    def _update(self, chunk: ChunkLayout, after_s: float) -> None:
        if self.homes[chunk.index].streamed:
            self._stream(chunk, after_s)
        else:
            self._put(chunk, after_s, self.rates.host_params_per_s, updates=True)
            self.pending.add(chunk.index)

    def _stream(self, chunk: ChunkLayout, after_s: float) -> None:
        """Up, update and down, piece by piece; the worker is the slower for what passes through its memory."""
        state, _ = self.format.travelling_bytes(chunk, self.homes[chunk.index])
        self.now_s += LAUNCH_S
        self.travel_s = self.fresh_s[chunk.index] = self._copied(state, after_s, self.travel_s)
        self._put(chunk, after_s, self.rates.passing_params_per_s)

    def _work_until_updated(self, index: int) -> None:
        """Let the worker go on, always with the first chunk of those that it may begin with."""
        while index in self.pending:
            if not self.come:
                self.host_s = max(self.host_s, self.coming[0][0])
            while self.coming and self.coming[0][0] <= self.host_s:
                heapq.heappush(self.come, heapq.heappop(self.coming)[1])
            number, updates, seconds = heapq.heappop(self.come)
            self.host_s += seconds
            if updates:
                self._update_on_host(self.chunks[number])

    def _update_on_host(self, chunk: ChunkLayout) -> None:
        self.pending.remove(chunk.index)
        resident = self.homes[chunk.index].resident
        self.fresh_s[chunk.index] = self._copy_up(chunk, self.host_s) if resident else self.host_s

    def _copy_up(self, chunk: ChunkLayout, after_s: float) -> float:
        """Weights come to the device."""
        self.up_s = self._copy(chunk.shard_bytes, after_s, self.up_s)
        return self.up_s

    def _copy(self, num_bytes: int, *after_s: float) -> float:
        """When weights or activations are copied. States that travel have what is left of the bus."""
        end_s = self._copied(num_bytes, *after_s)
        copy_s = num_bytes / self.rates.bus_bytes_per_s
        begin_s = end_s - copy_s
        self.travel_s += copy_s * (self.travel_s > begin_s)
        for index in self.streamed:
            self.fresh_s[index] += copy_s * (self.fresh_s[index] > begin_s)
        return end_s

    def _copied(self, num_bytes: int, *after_s: float) -> float:
        """When a copy is done. Compute waits for it where nothing overlaps."""
        if self.rates.overlaps:
            return max(after_s) + num_bytes / self.rates.bus_bytes_per_s
        self.now_s = max(self.now_s, *after_s) + num_bytes / self.rates.bus_bytes_per_s
        return self.now_s
