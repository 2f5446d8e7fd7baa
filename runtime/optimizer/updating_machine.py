"""The machine of our own optimizer: updates run beside the program, chunk by chunk, on both sides.

It carries out the same instructions as `Machine`. A chunk's gradient goes where its training state is updated;
a ticket then stands for the update under way, and whoever needs the chunk next waits for that alone: the
device through an event, the launching thread only for the host's worker, and only until its copy is issued.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..isa.errors import StateError
from ..isa.layout import STREAMED_GRADIENTS, ChunkLayout, longest_of_each_kind
from ..isa.torch_private import unmetered
from ..kernels.update_rules import Gradient
from ..machine import ALONE, Machine
from ..memory.chunks import Chunk, State
from ..memory.stats import Stats
from ..memory.streams import Arrival
from .gradients import HeldGradients
from .own_states import StatePlacing
from .state_stream import StateStream, StreamedUpdate
from .states import ChunkState, Schedule, Stretch, Where
from .updates import UpdateKernels
from .worker import Tickets, Worker

HALF_UPDATED = (
    "{} failed when some parameters were updated already and others not, so that this run cannot go on: build the "
    "model anew and load the last checkpoint"
)


@dataclass(frozen=True)
class _Factor:
    """What gradients are multiplied by, for updates on either side. It is kept for as long as they may read it."""

    on_device: float | Tensor
    on_host: float | Tensor
    arrival: Arrival


UNSCALED = _Factor(1.0, 1.0, None)


class UpdatingMachine(Machine):
    """Runs the instructions, and the updates that `schedule` describes."""

    placing: StatePlacing  # type: ignore[assignment]  # the two placings answer the same questions

    def __init__(self, placing: StatePlacing, stats: Stats, ranks: Ranks = ALONE) -> None:
        super().__init__(placing, stats, ranks)  # type: ignore[arg-type]
        self.updates = placing.updates
        self.zero = placing.zero
        self.schedule: Schedule = lambda name, number: None
        self.backwards = 0
        self.kernels = UpdateKernels(self.device, ranks.on_this_host)
        self.worker = Worker()
        self.tickets = Tickets(self.worker, self.copies, lambda index: placing.states[index].name)
        self.held = HeldGradients(placing, self.tickets, stats)
        self.streams: dict[tuple[torch.dtype, torch.dtype], StateStream] = {}
        self._host_update_s = 0.0
        self.broken = ""
        self.writable = False
        self._released: dict[int, Arrival] = {}
        self._streamed: list[tuple[Arrival, Tensor]] = []
        self._factors: dict[bool, _Factor] = {}
        self._stream_bytes = 0

    def place(self, masters: frozenset[int], weights: frozenset[int], streamed: frozenset[int]) -> None:
        """Put the training states where they belong. Raises BudgetError on a full tier."""
        self.finish()
        self.held.finish()
        self.placing.place(masters, weights, streamed)
        kinds = longest_of_each_kind(s.layout for s in self.placing.states if s.where is Where.STREAMED)
        num_bytes = sum(map(self.updates.stream_bytes, kinds))
        if num_bytes != self._stream_bytes:
            self.streams = {}
            self.placing.device_tier.charge(num_bytes - self._stream_bytes, "states on their way through the device")
            self._stream_bytes = num_bytes
            with_gradients = not self.updates.at_once
            for layout in kinds:
                stream = StateStream(self.device, self.placing.states[layout.index], with_gradients=with_gradients)
                self.streams[_kind(layout)] = stream

    # -- weights -------------------------------------------------------------------------------------------

    def fetch(self, index: int, numel: int, dtype: torch.dtype) -> Tensor:
        self.check()
        chunk, state = self.chunks[index], self.placing.states[index]
        if chunk.state is State.FREE:
            chunk.move(State.HOLD)
        if chunk.layout.shards > 1:
            return self._gathered(chunk, state)
        if self.placing.on_device(index):
            return state.weights
        if chunk.resident is not None:
            return chunk.resident
        target = torch.empty(numel, dtype=dtype, device=self.device)
        allocated = self.copies.mark()
        start = lambda updated: self.copies.to_device(target, state.weights, allocated, updated)  # noqa: E731
        ticket = self.tickets.get(index)
        if ticket is None:
            self._arrivals[index] = start(None)
        else:  # the worker starts the copy as soon as the weights are new
            ticket.then(start)
            self._arrivals[index] = None
        self.stats.moved(to_device=target.nbytes)
        return target

    def _gathered(self, chunk: Chunk, state: ChunkState) -> Tensor:
        """Start to make a divided chunk whole. The launching thread waits for this process's shard to be updated: if
        it left that to the worker, collectives would start in an order that differs between the processes."""
        index, own = chunk.layout.index, state.weights
        if chunk.resident is not None and chunk.gathered == state.version:
            return chunk.resident
        whole = chunk.resident
        if whole is None:
            whole = torch.empty(chunk.layout.numel, dtype=chunk.layout.dtype, device=self.device)
        ready: tuple[Arrival, ...] = self.copies.mark(), self.tickets.take(index)
        if not self.placing.weights_on_device(index):
            own = self.zero.own(whole, chunk.layout)
            if chunk.resident is None:
                ready = (self.copies.to_device(own, state.weights, *ready),)
                self._arrivals[index] = ready[0]
                self.stats.moved(to_device=own.nbytes)
        with self.copies.exchange(*ready):
            self.zero.gather(self.exchange, whole, own, chunk.layout)
        chunk.gathered = state.version
        return whole

    def wait(self, fetched: Tensor, index: int) -> Tensor:
        self.tickets.arrive(index)
        if self.exchange.is_under_way(fetched):
            self.exchange.finish(fetched)
        return super().wait(fetched, index)

    def release(self, weights: Tensor, index: int) -> None:
        self._released[index] = self.copies.mark()
        super().release(weights, index)

    # -- gradients -----------------------------------------------------------------------------------------

    def gradients(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros, so that what lies between the slots counts for nothing in norms and moments."""
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def reduce(self, gradients: Tensor, index: int, slots: list[int]) -> None:
        chunk, state = self.chunks[index], self.placing.states[index]
        self._complete(chunk)
        gradients = self.zero.reduce(gradients, chunk.layout)
        self.tickets.arrive(index)
        last = self.backwards == self.updates.accumulate
        adds = state.present or self.updates.accumulate > 1
        if chunk.layout.shards > 1 and not adds and self.held.keeps(state):
            gradients = gradients.clone()  # or it would keep the program's whole buffer
        with unmetered():
            if adds:
                self.held.add(state, gradients, slots)
            else:
                self.held.hold(state, gradients, slots)
            if self.updates.in_backward and last:
                self._update(index, UNSCALED)

    def settle(self, gradients: Tensor, index: int, slots: list[int]) -> None:
        """The gradients may be freed from here on: whoever still reads them is waited for by the device."""
        self.copies.arrive(self.held.landed(index))
        while len(self._streamed) > STREAMED_GRADIENTS:
            self.copies.arrive(self._streamed.pop(0)[0])
        self._hold(self.chunks[index])

    # -- updates -------------------------------------------------------------------------------------------

    def update_all(self, scale: float | Tensor) -> None:
        """Start to update every chunk that has a gradient, in the order in which the next forward needs them.

        Where that fails half way no further step is taken: some parameters are of this step, others are not.
        """
        waiting = [state for state in self.placing.states if state.present]
        if not waiting:
            return  # in_backward: what the host still updates runs beside the next forward
        self.tickets.arrive_all()  # whoever reads the factors of the step before is done with them
        unscaled = scale / self.held.loss_scale
        self._factors = {added: self._factor(scale if added else unscaled) for added in (False, True)}
        try:
            for state in waiting:
                self._update(state.layout.index, self._factors[state.added])
        except BaseException:
            self.broken = HALF_UPDATED.format("optimizer.step()")
            raise

    def _factor(self, scale: float | Tensor) -> "_Factor":
        """A factor that the device computes comes to the host without anybody waiting for it yet."""
        if not isinstance(scale, Tensor) or scale.device.type == "cpu":
            return _Factor(scale, scale, None)
        on_host = torch.empty((), dtype=torch.float32, pin_memory=True)
        return _Factor(scale, on_host, self.copies.to_host(on_host, scale))

    def _update(self, index: int, factor: "_Factor") -> None:
        state = self.placing.states[index]
        stretches = state.stretches(self.schedule)
        gradient = Gradient(state.gradient, factor.on_host if state.where is Where.HOST else factor.on_device)
        state.version += 1
        if state.where is Where.DEVICE:
            for stretch in stretches:
                self._update_stretch(state, stretch, gradient)
        elif state.where is Where.HOST:
            resident = self.chunks[index].resident
            self.stats.moved(to_device=0 if resident is None else state.weights.nbytes)
            after = (self.held.landed(index), self._released.get(index), factor.arrival)
            self.tickets.submit(index, partial(self._update_on_host, index, stretches, gradient), *after)
        else:
            self._stream_update(index, stretches, gradient)
        state.forget_gradient()

    def _update_stretch(self, state: ChunkState, stretch: Stretch, gradient: Gradient) -> None:
        values = gradient.values[stretch.start : stretch.end]
        part = state.part(stretch.start, stretch.end)
        self.kernels.update(state.layout, part, Gradient(values, gradient.scale), stretch)

    def _update_on_host(self, index: int, stretches: list[Stretch], gradient: Gradient) -> Arrival:
        """The worker's job, once the gradient is here and nobody reads the old weights any more."""
        state, resident = self.placing.states[index], self.chunks[index].resident
        began_s = time.perf_counter()
        with torch.no_grad():
            for stretch in stretches:
                self._update_stretch(state, stretch, gradient)
            self._host_update_s += time.perf_counter() - began_s
            if resident is None:
                return None
            own = self.zero.own(resident, self.chunks[index].layout)
            return self.copies.to_device(own, state.weights, None)

    def _stream_update(self, index: int, stretches: list[Stretch], gradient: Gradient) -> None:
        state = self.placing.states[index]
        stays = self.placing.weights_on_device(index)
        if state.added:  # the worker may still add to the sum
            self.tickets.take(index)
        after = () if self.updates.at_once else (self.held.landed(index),)
        job = StreamedUpdate(gradient, self.kernels, stays, after)
        done = self.streams[_kind(state.layout)].update(state, stretches, job)
        self.tickets.put(index, done)
        if self.updates.at_once:
            self._streamed.append((done, gradient.values))
            state.held = None
        rest = 0 if state.rest is None else state.rest.nbytes
        travels = rest + sum(moment.nbytes for moment in state.moments) + (0 if stays else state.weights.nbytes)
        self.stats.moved(to_device=travels + (0 if self.updates.at_once else gradient.values.nbytes), to_host=travels)

    # -- steps ---------------------------------------------------------------------------------------------

    def begin_backward(self) -> float:
        self.check()
        if self.updates.in_backward and self.backwards == self.updates.accumulate:
            raise StateError(
                f"a backward() more than accumulate={self.updates.accumulate} came before optimizer.step(): with "
                "in_backward=True the parameters are updated already. Call step() after every "
                f"{self.updates.accumulate} backward(s), or declare how many come with model.optimizer(accumulate=)"
            )
        self.backwards += 1
        return self.held.loss_scale

    def state_of(self, parameter: str) -> tuple[ChunkState, int]:
        """A parameter's training state and its slot in there. Raises StateError where there is none yet."""
        if not self.placing.states:
            raise StateError(
                "the model's weights are on 'meta', and so there are no training states yet; give it values with "
                "model.load_state_dict(...) first"
            )
        layout, slot = self.place_of(parameter)
        return self.placing.states[layout.index], slot

    def place_of(self, parameter: str) -> tuple[ChunkLayout, int]:
        """The whole chunk that a parameter lies in, and its slot there."""
        return self.placing.store.layout.places[parameter]

    def take(self, value: Tensor, parameter: str) -> Tensor:
        """What of a parameter's value lies in this process's training state."""
        return self.zero.take(value, *self.place_of(parameter))

    def join(self, held: Tensor, parameter: str) -> Tensor:
        """The inverse: of what lies in every process's. All processes call it where the chunk is divided."""
        return self.zero.join(held, *self.place_of(parameter), self.device)

    def versions(self) -> dict[str, int]:
        return {slot.name: state.version for state in self.placing.states for slot in state.layout.slots}

    def forget_gradient(self, parameter: str) -> None:
        """Drop one parameter's gradient."""
        state, slot = self.state_of(parameter)
        if slot not in state.present:
            return
        self.finish(state.layout.index)
        self.held.forget(state, slot)

    def forget_gradients(self) -> None:
        """Drop what gradients there are. Raises StateError where they are used up already, but not by a step."""
        if self.updates.in_backward and self.backwards == self.updates.accumulate:
            raise StateError(
                "zero_grad() came between the last backward() of a step and optimizer.step(), but with "
                "in_backward=True the parameters are updated already; call zero_grad() after step(), or leave it out"
            )
        self.held.forget_all()
        self.backwards = 0

    def finish(self, index: int | None = None) -> None:
        """Block until updates under way are done and the states on the host are whole."""
        self.check()
        for number in range(len(self.placing.states)) if index is None else [index]:
            self.tickets.finish(number)
            for stream in self.streams.values():
                stream.finish(number)
            self.copies.finish(self._arrivals.get(number))

    @property
    def host_update_s(self) -> float:
        return self._host_update_s

    def check(self) -> None:
        """Raises StateError where the states are no whole step's any more."""
        self.worker.check()
        if self.broken:
            raise StateError(self.broken)

    def abort(self) -> str:
        half_way = self.updates.in_backward and self.run.backward and self.backwards == self.updates.accumulate
        left = super().abort()
        if half_way:
            self.broken = HALF_UPDATED.format("a backward() with in_backward=True")
        return self.broken + "." if self.broken else left


def _kind(layout: ChunkLayout) -> tuple[torch.dtype, torch.dtype]:
    return layout.dtype, layout.master_dtype
