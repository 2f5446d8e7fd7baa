"""The time that a plan takes: its program runs a few steps on a clock, with seconds in place of tensors.

Operators take what `costs` says; copies and exchanges take the time of their bytes. The clock models closely who waits
for whom, since that decides how much of the copies and updates hides behind compute: gradients complete one after
another, the host updates one chunk at a time, and the next forward begins with the chunk whose gradient came last.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass

from ...passes.program.estimate import CollectiveTraffic
from ...passes.program.plan import Plan
from ...passes.program.program import Program
from ...runtime.isa.formats import LANDINGS, STREAMED_GRADIENTS
from ...runtime.isa.homes import Homes, Where
from ...runtime.isa.instructions import ACCUMULATE_GRAD, FETCH, REDUCE, WAIT
from ...runtime.isa.layout import ChunkLayout
from ..rates.rates import STREAM_LAUNCH_S, Rates
from .bus import Bus
from .communication import gathered, reduced
from .timeline import AWAITED, Carrier, Stretch, Timeline, Transfer, timeline

STEPS = 3
"""Steps run on the clock. Only the last one counts, since work that one step leaves over delays the next."""

DEVICE, LAUNCHES, HOST = "device", "launches", "host updates"
"""The resources that may be busy, besides the carriers."""

WHOLE_MASTERS_SHARE = 0.75
"""The rate at which the host updates masters that are kept whole, by torch's functions in pieces, as a share of our
kernel's for bfloat16 weights and remainders, for equally many bytes. Two cores update 1.8 billion float16 weights a
second, of 30 bytes each, and 2.7 billion bfloat16 ones, of 26."""

_Job = tuple[int, bool, float]
"""A job of the host's worker: the index of a chunk, whether the job is its update, and seconds."""

COPY = -1
"""The index of a job that stands for what a copy keeps the worker waiting: copies do not queue behind updates."""


@dataclass(frozen=True)
class Timing:
    """Modelled seconds of a step, and the seconds that each resource is busy, the busiest first."""

    step_s: float
    busy_s: tuple[tuple[str, float], ...]


class StepTime:
    """Models the seconds of one training step, given the homes of the chunks."""

    def __init__(self, program: Timeline, rates: Rates) -> None:
        self.program = program
        self.rates = rates

    @classmethod
    def of(cls, program: Program, plan: Plan, rates: Rates) -> "StepTime":
        return cls(timeline(program, plan, rates), rates)

    def seconds(self, plan: Plan, homes: Homes) -> float:
        """Seconds from the end of one step to the end of the next; it runs the program `format.accumulate` times."""
        return self.timing(plan, homes).step_s

    def timing(self, plan: Plan, homes: Homes) -> Timing:
        clock = _Clock(plan, homes, self.rates)
        ends_s, busy = [0.0], [clock.busy()]
        for _ in range(STEPS):
            ends_s.append(clock.step(self.program))
            busy.append(clock.busy())
        found = {name: busy[-1][name] - busy[-2][name] for name in busy[-1]}
        found[DEVICE] += self.program.busy_s * plan.format.accumulate
        found[LAUNCHES] = self.program.launching_s * plan.format.accumulate
        busiest = sorted(((name, s) for name, s in found.items() if s > 0), key=lambda one: -one[1])
        return Timing(ends_s[-1] - ends_s[-2], tuple(busiest))


class _Clock:
    """The state of a simulated step: every resource, and when it will be done."""

    def __init__(self, plan: Plan, homes: Homes, rates: Rates) -> None:
        self.plan, self.homes, self.rates = plan, homes, rates
        self.chunks, self.format = plan.layout.chunks, plan.format
        self.updates = rates.updates(plan.format.stored)
        self.runs = plan.format.accumulate
        self.streamed = [index for index, home in enumerate(homes) if home.streamed]
        self.works = plan.format.beside and any(home.where is Where.HOST for home in homes)  # the host's worker
        self.bus = Bus(rates)
        self.busy_s: dict[str, float] = defaultdict(float)  # excluding the directions of the bus
        # When each is done with its work so far: compute, copies of weights and activations to the device, copies of
        # activations and of gradients to the host, states streamed through the device, the host's worker, exchanges.
        self.launched_s = 0.0  # when the launching thread is done
        self.now_s = self.up_s = self.down_s = self.land_s = self.travel_s = self.host_s = self.network_s = 0.0
        self.stepped_s = 0.0  # when the optimizer's step() was last called
        # Per chunk: when its fetch was reached, when its updated weights can be read, when its gradient has landed.
        self.fetched_s, self.fresh_s, self.landed_s = ([0.0] * len(self.chunks) for _ in range(3))
        self.copied: set[int] = set()  # for a torch optimizer: resident weights already copied in this run
        self.gathered: set[int] = set()  # resident weights already gathered in this run
        self.under_way: dict[int, float] = {}  # by number, when each started transfer will be done
        self.complete: list[int] = []  # chunks for step() to update
        self.coming: list[tuple[float, _Job]] = []  # the worker's later jobs and when each may begin; a heap
        self.come: list[_Job] = []  # the jobs that it may begin now; a heap
        self.pending: set[int] = set()  # chunks whose update on the host is still to be done
        self.landing: list[int] = []  # chunks whose gradients occupy the shared landings on the host
        self.unread: set[int] = set()  # the ones among them that the worker has not read yet
        self.read_s: dict[int, float] = {}  # when it finished reading the others
        self.reading: list[int] = []  # chunks whose gradients wait on the device for their states to stream by

    def step(self, program: Timeline) -> float:
        """Runs one more step. Returns when it ends, which may be before its updates are done."""
        for run in range(1, self.runs + 1):
            self.copied.clear()
            self.gathered.clear()
            for stretch, target, about in program.instructions:
                self._compute(stretch)
                if isinstance(about, Transfer):
                    self._begin(about, awaited=target in AWAITED)
                elif target is FETCH:
                    self.fetched_s[about] = self.now_s
                elif target is WAIT:
                    self._wait(self.chunks[about])
                elif target is REDUCE:
                    self._reduce(self.chunks[about], last=run == self.runs)
                elif target is ACCUMULATE_GRAD:
                    self._accumulate_grad(about)
                else:
                    self._finish(about)
            self._compute(program.rest)
        self._end()
        return self.now_s

    def _compute(self, stretch: Stretch) -> None:
        device_s, launching_s, done_s = stretch
        self.now_s = max(self.now_s + device_s, self.launched_s + done_s)
        self.launched_s += launching_s

    def _block(self, until_s: float) -> None:
        """The launching thread waits for the host's worker, and so does the device, once it has no more to do."""
        self.launched_s = max(self.launched_s, until_s)
        self.now_s = max(self.now_s, until_s)

    def busy(self) -> dict[str, float]:
        """Busy seconds of each resource so far, except for what the program computes."""
        carriers = {Carrier.UP.value: self.bus.up.busy_s, Carrier.DOWN.value: self.bus.down.busy_s}
        return {DEVICE: 0.0, HOST: 0.0, Carrier.NETWORK.value: 0.0} | carriers | self.busy_s

    # -- instructions --------------------------------------------------------------------------------------

    def _wait(self, chunk: ChunkLayout) -> None:
        index = chunk.index
        self._work_until_updated(index)
        arrival_s = self.fresh_s[index]
        home = self.homes[index]
        # Only updates that run beside the program copy new weights to the device themselves: see `_update_on_host`.
        stale = not self.format.beside and not home.on_device and index not in self.copied
        if not (home.resident or home.on_device) or stale:
            self.copied.add(index)
            arrival_s = self._copy_up(chunk, max(arrival_s, self.fetched_s[index]))
        if index not in self.gathered:
            if home.resident:
                self.gathered.add(index)
            arrival_s = self._exchanged(gathered(chunk), arrival_s, self.fetched_s[index])
        self.now_s = max(self.now_s, arrival_s)

    def _reduce(self, chunk: ChunkLayout, *, last: bool) -> None:
        """Handles a complete gradient; `last`: the step's last run, in which it is used and not only summed."""
        added_s = self._exchanged(reduced(chunk, self.plan), self.now_s)
        if self.homes[chunk.index].on_device:
            self.landed_s[chunk.index] = added_s
            self._on_device(chunk.shard_numel / self.rates.device_sums_per_s * self._adds)
            update_s = self._updated_s(chunk, self.updates.device_params_per_s) + self._products_s(chunk)
            self._on_device(update_s * last)
        elif self._waits_for_its_state(chunk.index):
            self._stream(chunk, added_s)
            self.reading = [*(i for i in self.reading if i != chunk.index), chunk.index]
        else:
            if self.format.shares_landing(chunk, self.homes[chunk.index]):
                self._take_landing(chunk.index)
            self.landed_s[chunk.index] = self._copy_down(chunk, added_s)
            if self._adds:
                self._put(chunk.index, self.landed_s[chunk.index], chunk.shard_numel / self.rates.host_sums_per_s)
            if last and (self.format.in_backward or self._has_spare(chunk)):
                self._update(chunk, self.landed_s[chunk.index])
            elif last:
                self.complete.append(chunk.index)

    def _take_landing(self, index: int) -> None:
        """Takes a shared landing for a gradient, waiting until the worker has read the gradient that occupies it."""
        freed = next((i for i in self.landing if i == index), None)
        if freed is None and len(self.landing) == LANDINGS:
            freed = next((i for i in self.landing if i not in self.unread), min(self.landing))
        if freed is not None:
            while freed in self.unread:
                self._work_on_next()
            self.landing.remove(freed)
            self._block(self.read_s[freed])
        self.landing.append(index)
        self.unread.add(index)

    def _accumulate_grad(self, index: int) -> None:
        """Waits until the memory of the gradient is free again."""
        if self._waits_for_its_state(index):
            while len(self.reading) > STREAMED_GRADIENTS:
                self.now_s = max(self.now_s, self.fresh_s[self.reading.pop(0)])
        else:
            self.now_s = max(self.now_s, self.landed_s[index])

    def _end(self) -> None:
        """The optimizer's step(), in the order of the next forward. A torch optimizer's ends with the last update."""
        self.stepped_s = self.now_s
        for chunk in (self.chunks[index] for index in sorted(self.complete)):
            if not self.format.beside:
                update_s = chunk.numel / self.rates.torch_params_per_s
                self.busy_s[HOST] += update_s
                self._block(self.now_s + update_s)
                self.fresh_s[chunk.index] = self.now_s
            else:
                self._update(chunk, self.now_s)
        self.complete.clear()

    def _begin(self, transfer: Transfer, *, awaited: bool) -> None:
        """Starts a transfer. If `awaited`, also waits for it; otherwise a later instruction does."""
        if transfer.carrier is Carrier.NETWORK:
            end_s = self._exchange(transfer.count, transfer.num_bytes, self.now_s)
        elif transfer.carrier is Carrier.UP:
            end_s = self.up_s = self._copied(Carrier.UP, transfer.num_bytes, max(self.now_s, self.up_s))
        else:
            end_s = self.down_s = self._copied(Carrier.DOWN, transfer.num_bytes, max(self.now_s, self.down_s))
        self.under_way[transfer.number] = end_s
        if awaited:
            self._finish(transfer.number)

    def _finish(self, number: int) -> None:
        self.now_s = max(self.now_s, self.under_way[number])

    # -- updates and copies --------------------------------------------------------------------------------

    def _waits_for_its_state(self, index: int) -> bool:
        return self.format.at_once and self.homes[index].streamed

    def _has_spare(self, chunk: ChunkLayout) -> bool:
        return self.format.has_spare(chunk, self.homes[chunk.index])

    def _updated_s(self, chunk: ChunkLayout, params_per_s: float) -> float:
        return chunk.shard_numel * self.format.update_share(chunk) / params_per_s

    def _products_s(self, chunk: ChunkLayout) -> float:
        """Seconds of the matrix products that the device computes for an update."""
        return self.rates.bf16.seconds(self.format.update_flop(chunk))

    @property
    def _adds(self) -> bool:
        """Whether gradients of several runs are summed before the update."""
        return self.format.beside and self.runs > 1

    def _put(self, index: int, after_s: float, takes_s: float, updates: bool = False) -> None:
        """Gives the worker a job for a chunk."""
        heapq.heappush(self.coming, (after_s, (index, updates, takes_s)))

    def _slow(self, num_bytes: int, after_s: float) -> None:
        """Slows the worker down, as bytes are copied to or from the memory that it works on."""
        if self.works:
            self._put(COPY, after_s, num_bytes / self.rates.passing_bytes_per_s)

    def _update(self, chunk: ChunkLayout, after_s: float) -> None:
        if self.homes[chunk.index].streamed:
            self._stream(chunk, after_s)
        else:
            params_per_s = self.updates.host_params_per_s * (1.0 if chunk.splits else WHOLE_MASTERS_SHARE)
            self._put(chunk.index, after_s, self._updated_s(chunk, params_per_s), updates=True)
            self.pending.add(chunk.index)

    def _stream(self, chunk: ChunkLayout, after_s: float) -> None:
        """Streams a state through the device: up, update and down, piece by piece."""
        up_bytes, down_bytes = self.format.travelling_bytes(chunk, self.homes[chunk.index])
        self.launched_s += STREAM_LAUNCH_S
        self._on_device(self._products_s(chunk))
        end_s = self.bus.through(up_bytes, down_bytes, self._from(max(after_s, self.travel_s)))
        self.travel_s = self.fresh_s[chunk.index] = self._beside(end_s)
        self._slow(up_bytes + down_bytes, after_s)

    def _work_until_updated(self, index: int) -> None:
        """Runs the worker until the chunk is updated. Of the jobs that may begin it takes the lowest-numbered chunk."""
        while index in self.pending:
            self._work_on_next()
            self._block(self.host_s)

    def _work_on_next(self) -> None:
        if not self.come:
            self.host_s = max(self.host_s, self.coming[0][0])
        while self.coming and self.coming[0][0] <= self.host_s:
            heapq.heappush(self.come, heapq.heappop(self.coming)[1])
        number, updates, seconds = heapq.heappop(self.come)
        self._work(seconds)
        if updates:
            self._update_on_host(self.chunks[number])
        if number in self.unread:
            self.unread.remove(number)
            self.read_s[number] = self.host_s

    def _update_on_host(self, chunk: ChunkLayout) -> None:
        self.pending.remove(chunk.index)
        new_s = max(self.host_s, self.stepped_s) if self._has_spare(chunk) else self.host_s
        resident = self.homes[chunk.index].resident
        self.fresh_s[chunk.index] = self._copy_up(chunk, new_s) if resident else new_s

    def _copy_up(self, chunk: ChunkLayout, after_s: float) -> float:
        """Copies weights to the device."""
        begin_s = self._from(max(after_s, self.up_s))
        self.up_s = self._copied(Carrier.UP, chunk.shard_bytes, begin_s)
        self._delay_streams(begin_s, self.up_s)
        return self.up_s

    def _copy_down(self, chunk: ChunkLayout, after_s: float) -> float:
        """Copies a gradient to the host."""
        begin_s = self._from(max(after_s, self.land_s))
        self.land_s = self._copied(Carrier.DOWN, chunk.shard_bytes, begin_s)
        self._delay_streams(begin_s, self.land_s)
        return self.land_s

    def _delay_streams(self, begin_s: float, end_s: float) -> None:
        """Streamed states pass both ways, get what other copies leave of the bus, and are delayed by as much."""
        copy_s = end_s - begin_s
        self.travel_s += copy_s * (self.travel_s > begin_s)
        for index in self.streamed:
            self.fresh_s[index] += copy_s * (self.fresh_s[index] > begin_s)

    def _copied(self, direction: Carrier, num_bytes: int, after_s: float) -> float:
        """The time at which a copy is done."""
        copy, begin_s = self.bus.to_device if direction is Carrier.UP else self.bus.to_host, self._from(after_s)
        self._slow(num_bytes, begin_s)
        return self._beside(copy(num_bytes, begin_s))

    def _exchanged(self, traffic: CollectiveTraffic | None, *after_s: float) -> float:
        """The time at which an exchange is done; without one, the latest of `after_s`."""
        return max(after_s) if traffic is None else self._exchange(traffic.count, traffic.received_bytes, max(after_s))

    def _exchange(self, count: int, received_bytes: int, after_s: float) -> float:
        """Exchanges run one after another."""
        exchange_s = self.rates.exchange_s(count, received_bytes)
        self.busy_s[Carrier.NETWORK.value] += exchange_s
        self.network_s = self._from(max(after_s, self.network_s)) + exchange_s
        return self._beside(self.network_s)

    def _from(self, after_s: float) -> float:
        """When work begins that may start at `after_s`: not before compute gets there, where nothing overlaps."""
        return after_s if self.rates.overlaps else max(after_s, self.now_s)

    def _beside(self, end_s: float) -> float:
        """Where nothing overlaps, compute waits for the end of everything."""
        if not self.rates.overlaps:
            self.now_s = end_s
        return end_s

    def _on_device(self, seconds: float) -> None:
        """Keeps the device busy with a training state."""
        self.busy_s[DEVICE] += seconds
        self.now_s += seconds

    def _work(self, seconds: float) -> None:
        """Keeps the host's worker busy."""
        self.host_s += seconds
        self.busy_s[HOST] += seconds
