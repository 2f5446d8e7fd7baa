"""The store of the built-in optimizer: states that are updated beside the program, chunk by chunk, on both sides.

A chunk's gradient goes to where its training state is updated. The next read of a chunk waits for that chunk's update
alone; see `updater`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..distributed.local_shards import Region
from ..distributed.zero import ALONE, Zero
from ..isa.errors import GeminiError, StateError
from ..isa.formats import OwnFormat
from ..isa.homes import Homes, Where
from ..isa.layout import ChunkLayout
from ..isa.torch_private import unmetered
from ..memory.chunks import Chunk, ChunkStore
from ..memory.hardware import Hardware
from ..memory.state_store import PARTIAL, Run
from ..memory.stats import Stats
from ..memory.stored import Stored
from ..memory.streams import Arrival
from .gradients import HeldGradients
from .own_states import OwnStates
from .slot_source import make_lazy
from .states import ChunkState
from .stored_moments import stored_moment
from .updater import Updater
from .updates import UpdateKernels
from .weak_method import optimizer_is_gone
from .worker import Tickets, Worker
from .zeroed import ZeroedGradients

HALF_UPDATED = (
    "{} failed after some parameters were updated and others were not, so this run cannot continue: build the model "
    "again and load the last checkpoint"
)
NO_STATES = "the weights are on 'meta', so there are no training states yet; load values with load_state_dict(...)"


class OwnStore:
    """Training states, their gradients, and the updates under way; implements `StateStore`.

    `backwards` counts the backwards completed since the last step. `check_groups` raises if the optimizer's
    groups, as they are now, do not allow an update, or if the optimizer is gone. `zero` tells which shard of each
    divided chunk is this process's.
    """

    def __init__(self, chunks: ChunkStore, hardware: Hardware, format: OwnFormat, stats: Stats,
                 zero: Zero = ALONE) -> None:  # fmt: skip
        self.chunks = chunks
        self.hardware = hardware
        self.format = format
        self.stats = stats
        self.zero = zero
        self.copies = hardware.new_copies()
        self.collectives = zero.ranks.collectives
        self.states = OwnStates(chunks, hardware, format, zero)
        self.worker = Worker()
        self.tickets = Tickets(self.worker, self.copies, self.states.name_of)
        kernels = UpdateKernels(hardware.device, zero.ranks.on_this_host)
        self.held = HeldGradients(self.states, self.tickets, kernels, stats)
        self.updater = Updater(self.states, self.tickets, self.held, kernels, stats)
        self.zeroed = ZeroedGradients()
        self.backwards = 0
        self.check_groups: Callable[[], None] = optimizer_is_gone
        self._broken = ""
        self._has_updated = False  # whether this backward has updated a chunk
        self._begins = False  # whether this backward begins updates early
        self._is_partial = False  # whether the gradients are those of an unfinished backward
        self._arrivals: dict[int, Arrival] = {}

    @property
    def host_update_s(self) -> float:
        return self.updater.host_update_s + self.held.host_sum_s

    @property
    def is_between_steps(self) -> bool:
        return self.backwards == 0

    @property
    def loss_scale(self) -> float:
        return self.held.loss_scale

    # -- placement -----------------------------------------------------------------------------------------

    def place(self, homes: Homes) -> None:
        """Puts the training states into their homes; from then on parameters are read from there.

        Raises BudgetError on a full tier. Some states are then not in place; they may be placed again, here or where
        they were.
        """
        self.finish()
        self.held.finish()
        self.updater.drop_streams(homes)
        self.chunks.let_go()
        try:
            with self.hardware.placing():
                self.states.place(homes)
                self.updater.make_streams()
                self.held.landings.make(self.format, list(self.states))
        finally:
            make_lazy(self)

    def leave(self) -> None:
        raise StateError(
            "model.optimizer(...) holds this model's training state permanently; compile the model again for another"
        )

    # -- weights -------------------------------------------------------------------------------------------

    def fetch(self, chunk: Chunk, run: Run) -> Tensor:
        self.check()
        index, state = chunk.layout.index, self.states[chunk.layout.index]
        if chunk.layout.shards > 1:
            return self._gathered(chunk, state)
        if state.home.weights_on_device:
            return state.weights
        if chunk.resident is not None:
            return chunk.resident
        target = torch.empty(chunk.layout.numel, dtype=chunk.layout.dtype, device=self.hardware.device)
        allocated = self.copies.mark()
        start = lambda updated: self.copies.to_device(target, state.weights, allocated, updated)  # noqa: E731
        ticket = self.tickets.get(index)
        if ticket is None:
            self._arrivals[index] = start(None)
        else:  # the worker starts the copy as soon as the weights are updated
            ticket.then(start)
            self._arrivals[index] = None
        self.stats.moved(to_device=target.nbytes)
        return target

    def _gathered(self, chunk: Chunk, state: ChunkState) -> Tensor:
        """Starts to gather a divided chunk. The launching thread waits until the worker has updated this process's
        shard: if the worker launched the collective, processes would launch collectives in different orders."""
        index, own = chunk.layout.index, state.weights
        if chunk.resident is not None and chunk.gathered == state.version:
            return chunk.resident
        whole = chunk.resident
        if whole is None:
            whole = torch.empty(chunk.layout.numel, dtype=chunk.layout.dtype, device=self.hardware.device)
        ready: tuple[Arrival, ...] = self.copies.mark(), self.tickets.take(index)
        if not state.home.weights_on_device:
            own = self.zero.own(whole, chunk.layout)
            if chunk.resident is None:
                ready = (self.copies.to_device(own, state.weights, *ready),)
                self._arrivals[index] = ready[0]
                self.stats.moved(to_device=own.nbytes)
        with self.copies.collective(*ready):
            self.zero.gather(self.collectives, whole, own, chunk.layout)
        chunk.gathered = state.version
        return whole

    def arrive(self, chunk: Chunk, weights: Tensor) -> None:
        index = chunk.layout.index
        updated = self.tickets.take(index)
        if updated is not None:  # or the copy that the worker started after the update; `finish` waits for it, too
            self._arrivals[index] = updated
        if self.collectives.is_under_way(weights):
            self.collectives.finish(weights)
        self.copies.arrive(self._arrivals.get(index))

    def release(self, chunk: Chunk) -> None:
        if self.states[chunk.layout.index].where is Where.HOST:  # else updates are launched behind the reads
            self.updater.released[chunk.layout.index] = self.copies.mark()

    def stays(self, chunk: Chunk) -> bool:
        home = self.states[chunk.layout.index].home
        return chunk.resident is not None or (home.weights_on_device and chunk.layout.shards == 1)

    # -- gradients -----------------------------------------------------------------------------------------

    def gradients(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros, so that the padding between slots does not enter norms and moments."""
        return torch.zeros(numel, dtype=dtype, device=self.hardware.device)

    def reduce(self, chunk: Chunk, gradients: Tensor, slots: list[int]) -> None:
        index, state = chunk.layout.index, self.states[chunk.layout.index]
        gradients = self.zero.reduce(gradients, chunk.layout)
        self.tickets.arrive(index)
        self._is_partial = True
        self.zeroed.brought(index, slots)
        last = self.backwards + 1 == self.format.accumulate
        adds = state.present or self.format.accumulate > 1
        if chunk.layout.shards > 1 and not adds and self.held.keeps(state):
            gradients = gradients.clone()  # else the shard would keep the program's whole buffer alive
        with unmetered():
            if adds:
                self.held.add(state, gradients, slots)
            else:
                self.held.hold(state, gradients, slots)
            if self.format.in_backward and last:
                self._has_updated = True
                self.updater.update(state)
            elif self._begins:
                self.updater.begin(state)

    def accumulate_grad(self, chunk: Chunk, gradients: Tensor, slots: list[int]) -> None:
        """Lets the program free the gradients: the device waits for those that still read them."""
        self.copies.arrive(self.held.landed(chunk.layout.index))
        self.updater.free_gradients()

    # -- steps ---------------------------------------------------------------------------------------------

    def begin_backward(self) -> float:
        self.check_gradients()
        if self.format.in_backward and self.backwards == self.format.accumulate:
            raise StateError(
                f"backward() was called more than accumulate={self.format.accumulate} times before optimizer.step(), "
                "but with in_backward=True the parameters are already updated. Call step() after every "
                f"{self.format.accumulate} backward(s), or declare their number with model.optimizer(accumulate=)"
            )
        if self.format.in_backward:
            self.check_groups()  # an error in the middle of the updates could not be undone
        self._has_updated = False
        self._begins = self._may_begin()
        return self.held.loss_scale

    def _may_begin(self) -> bool:
        """Whether updates may begin in this backward, ahead of `step()`. Not where sums are measured: the host takes
        their norms at the step, and needs the time for that."""
        format, held = self.format, self.held
        if format.in_backward or self.backwards + 1 != format.accumulate or held.loss_scale != 1.0:
            return False
        if (held.measures and format.accumulate > 1) or not self.updater.bets.are_on():
            return False
        try:
            self.check_groups()
        except GeminiError:
            return False  # if the groups do not change, step() raises it
        return True

    def end_backward(self) -> None:
        self.backwards += 1
        self._is_partial = False

    def update_all(self, scale: float | Tensor) -> None:
        """Starts to update every chunk that has a gradient, which ends the step. If that fails half way, some
        parameters are of this step and others are not, and no further step is taken."""
        self._broken = HALF_UPDATED.format("optimizer.step()")
        self.updater.update_all(scale)
        self.backwards = 0
        self._broken = ""

    def rest(self) -> None:
        """Nothing to wait for: writers to the states wait in `finish`."""

    def finish(self, index: int | None = None) -> None:
        """Blocks until updates under way are done and the states on the host are whole; of one chunk or of all."""
        self.check()
        for number in range(len(self.states)) if index is None else [index]:
            self.states[number].call_off()  # the caller may write to the state
            self.updater.finish(number)
            self.copies.finish(self._arrivals.get(number))

    def check(self) -> None:
        """Raises StateError if the states are no longer those of a whole step."""
        self.worker.check()
        if self._broken:
            raise StateError(self._broken)

    def check_gradients(self) -> None:
        """Raises StateError if gradients are those of an unfinished backward."""
        self.check()
        if self._is_partial and self._has_updated:
            self._broken = HALF_UPDATED.format("a backward() with in_backward=True")
            self.check()
        if self._is_partial:
            raise StateError(PARTIAL)

    def abort(self, run: Run) -> str:
        self.collectives.abandon()
        self.tickets.forget()  # they would copy into memory that is freed with the program
        if self._has_updated and run.counts:
            self._broken = HALF_UPDATED.format("a backward() with in_backward=True")
            return f"{self._broken}."
        return "Parameters and optimizer state are as before the step; call zero_grad() before the next one."

    def stale(self) -> str:
        if self.format.in_backward and self.backwards == self.format.accumulate:
            self._broken = HALF_UPDATED.format("A step of several calls before one backward(), with in_backward=True,")
            return f"{self._broken}; declare the number of calls per step with model.optimizer(accumulate=)"
        return "Call backward() first, or call the model again"

    # -- parameters ----------------------------------------------------------------------------------------

    def state_of(self, parameter: str) -> tuple[ChunkState, int]:
        """A parameter's training state and its slot there. Raises StateError if there is none yet."""
        if not len(self.states):
            raise StateError(NO_STATES)
        layout, slot = self.place_of(parameter)
        return self.states[layout.index], slot

    def place_of(self, parameter: str) -> tuple[ChunkLayout, int]:
        """The whole chunk, not the shard, that a parameter lies in, and its slot there."""
        return self.chunks.place_of(parameter)

    def take(self, value: Tensor, parameter: str) -> Tensor:
        """The part of a parameter's value that lies in this process's training state."""
        return self.zero.take(value, *self.place_of(parameter))

    def join(self, held: Tensor, parameter: str) -> Tensor:
        """The inverse of `take`: joins the parts of all processes. For a divided chunk, all processes that have the
        parameter must call it; a parameter of layers on other ranks is returned as it is."""
        if parameter in self.chunks.elsewhere:
            return held
        return self.zero.join(held, *self.place_of(parameter), self.hardware.device)

    def is_shared_out(self, parameter: str) -> bool:
        """Whether any process holds less than the whole parameter: this one, or one that runs other layers."""
        if self.chunks.layout.owned:
            return True
        layout, slot = self.place_of(parameter)
        return bool(layout.slots[slot].placement) or layout.shards > 1

    def moments_of(self, parameter: str) -> list[Tensor]:
        """This process's part of each of a parameter's moments."""
        state, slot = self.state_of(parameter)
        return [state.read_moment(number, slot) for number in range(len(state.moment_places(slot)))]

    def versions(self) -> dict[str, int]:
        return {slot.name: state.version for state in self.states for slot in state.layout.slots}

    def adopt(self) -> None:
        """Nothing to take over: parameters are written only through this store."""

    def writable(self) -> AbstractContextManager[None]:
        return self.chunks.writers.writing()

    def zero_grad(self, set_to_none: bool) -> None:
        """Drops all gradients; those set to zero must be computed anew before the next step.

        Raises StateError if in_backward=True has consumed them already but `step()` has not been called.
        """
        self.check()
        if self.format.in_backward and self.backwards == self.format.accumulate:
            raise StateError(
                "zero_grad() was called between the last backward() of a step and optimizer.step(), but with "
                "in_backward=True the parameters are already updated; call zero_grad() after step(), or leave it out"
            )
        self._is_partial = True
        self.zeroed.drop() if set_to_none else self.zeroed.zero()
        self.held.forget_all()
        self.updater.forget_begun()
        self.backwards = 0
        self._is_partial = False

    def forget_gradient(self, parameter: str) -> None:
        """Drops one parameter's gradient."""
        state, slot = self.state_of(parameter)
        self.zeroed.forget(state.layout.index, slot)
        if slot in state.present:
            self.finish(state.layout.index)
            self.held.forget(state, slot)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        self.check_gradients()
        self._is_partial = not self.format.in_backward
        norm = self.held.clip(max_norm)
        self._is_partial = False
        return norm

    # -- checkpoints ---------------------------------------------------------------------------------------

    def stored_master(self, parameter: str) -> Stored:
        if parameter in self.chunks.elsewhere:
            return self.chunks.elsewhere[parameter].stored
        state, _ = self.state_of(parameter)
        shape, regions = self._lies(parameter)
        return Stored(shape, state.layout.master_dtype, regions, state.read_region, state.write_region)

    def stored_moments(self, parameter: str) -> list[Stored]:
        """A parameter's moments as a checkpoint reads and writes them."""
        state, slot = self.state_of(parameter)
        if state.layout.rule == "factored":
            regions_of = self.chunks.local_shards.regions
            return [Stored.of(flat, place.shape, regions_of(place)) for flat, place in state.moment_places(slot)]
        shape, regions = self._lies(parameter)
        return [stored_moment(state, number, slot, shape, regions) for number in range(len(state.moments))]

    def _lies(self, parameter: str) -> tuple[tuple[int, ...], tuple[Region, ...]]:
        """A parameter's whole shape, and the regions of it that this process holds."""
        layout, number = self.place_of(parameter)
        slot, held = layout.slots[number], None
        if layout.shards > 1:
            first = self.zero.number(layout) * layout.shard_numel
            held = first, first + layout.shard_numel
        return self.chunks.local_shards.whole_shape(slot), self.chunks.local_shards.regions(slot, held)

    def masters_written(self) -> None:
        for chunk, state in zip(self.chunks.chunks, self.states, strict=True):
            state.version += 1
            chunk.gathered = -1
            if chunk.resident is not None:
                self.zero.own(chunk.resident, chunk.layout).copy_(state.weights)
