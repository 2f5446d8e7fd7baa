"""The machine: it implements the instruction set over chunks, tiers and copies.

Generated programs call it as `geminifx`. Its methods carry the instructions' names and arguments; each does
one thing, and where the chunks are placed alone decides whether bytes move.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .distributed.ranks import Ranks
from .distributed.reduction import all_reduce_
from .isa.instructions import parameter_view, put_product
from .kernels.random_state import fork
from .memory.chunks import Chunk, State
from .memory.masters import Placing
from .memory.stats import Stats
from .memory.streams import Arrival, copy_engine, host_buffer

ALONE = Ranks()


@dataclass
class Run:
    """One step under way: the chunks its backward reduces, and those it has copied from their masters."""

    reduces: frozenset[int] = frozenset()
    backward: bool = False
    refreshed: set[int] = field(default_factory=set)


class Machine:
    """Runs the instructions of one model's programs on one device ("cpu": the budgeted arena in RAM)."""

    def __init__(self, placing: Placing, stats: Stats, ranks: Ranks = ALONE) -> None:
        self.placing = placing
        self.ranks = ranks
        self.exchange = exchange = ranks.collectives
        self.start_all_gather, self.start_reduce_scatter = exchange.start_all_gather, exchange.start_reduce_scatter
        self.start_all_reduce, self.finish_exchange = exchange.start_all_reduce, exchange.finish_exchange
        self.local, self.offset = exchange.local, exchange.offset
        self.chunks = placing.store.chunks
        self.device = placing.device
        self.stats = stats
        self.run = Run()
        self.copies = copy_engine(self.device)
        self._arrivals: dict[int, Arrival] = {}
        self._staged: dict[int, tuple[Tensor, Arrival]] = {}
        self._staging: dict[torch.dtype, list[Tensor]] = {}
        self._apart: Tensor | None = None  # what was the generator's state, while it has another

    def __getattr__(self, name: str) -> Any:
        """Compute operators of the namespace, such as attention, are torch's to run."""
        operator = getattr(torch.ops.geminifx, name).default
        setattr(self, name, operator)
        return operator

    # -- weights -------------------------------------------------------------------------------------------

    def fetch(self, index: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Start to bring a chunk's weights to the device, in the compute dtype."""
        chunk = self.chunks[index]
        if chunk.state is State.FREE:
            chunk.move(State.HOLD)
        assert chunk.master is not None
        if self.placing.on_device(index):
            if not chunk.layout.casts:
                return chunk.master
            return self._device_copy(chunk).copy_(chunk.master)
        if chunk.resident is not None and index in self.run.refreshed:
            return chunk.resident
        target = self._device_copy(chunk)
        self._arrivals[index] = self.copies.to_device(target, self._host_source(chunk))
        self.stats.moved(to_device=target.nbytes)
        self.run.refreshed.add(index)
        return target

    def _device_copy(self, chunk: Chunk) -> Tensor:
        if chunk.resident is not None:
            return chunk.resident
        return torch.empty(chunk.layout.numel, dtype=chunk.layout.dtype, device=self.device)

    def _host_source(self, chunk: Chunk) -> Tensor:
        """The host tensor that streams. It is made anew from the master once in every step: an optimizer
        may write masters in ways that leave no trace, and stale weights would train wrongly in silence."""
        assert chunk.master is not None
        if chunk.cast is None:
            return chunk.master
        if chunk.layout.index not in self.run.refreshed:
            self.copies.finish(self._arrivals.get(chunk.layout.index))
            chunk.cast.copy_(chunk.master)
        return chunk.cast

    def wait(self, fetched: Tensor, index: int) -> Tensor:
        """From here on the chunk's weights are read."""
        self.copies.arrive(self._arrivals.get(index))
        self.chunks[index].move(State.COMPUTE)
        return fetched

    view = staticmethod(parameter_view)

    def release(self, weights: Tensor, index: int) -> None:
        """Nobody reads the weights any more; a copy that is not resident dies with its last name."""
        chunk = self.chunks[index]
        if self.run.backward and index in self.run.reduces:
            chunk.move(State.HOLD_AFTER_BACKWARD)
        else:
            self._hold(chunk)

    def _hold(self, chunk: Chunk) -> None:
        chunk.move(State.HOLD)
        stays = chunk.resident is not None or self.placing.on_device(chunk.layout.index)
        if not stays:
            chunk.move(State.FREE)

    # -- gradients -----------------------------------------------------------------------------------------

    def gradients(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer for a chunk's gradients, in the compute dtype."""
        return torch.empty(numel, dtype=dtype, device=self.device)

    @staticmethod
    def put(gradients: Tensor, offset: int, gradient: Tensor) -> None:
        parameter_view(gradients, offset, gradient.shape).copy_(gradient)

    put_mm = staticmethod(put_product)

    def reduce(self, gradients: Tensor, index: int, slots: list[int]) -> None:
        """A chunk's gradients are complete: start to move them to where its master is."""
        self._complete(self.chunks[index])
        all_reduce_(gradients, self.chunks[index].layout, self.ranks)
        if self.device.type == "cuda" and not self.placing.on_device(index):
            staging = self._take_staging(gradients)
            self._staged[index] = staging, self.copies.to_host(staging[: gradients.numel()], gradients)

    @staticmethod
    def _complete(chunk: Chunk) -> None:
        if chunk.state in (State.FREE, State.HOLD):  # its backward never read its weights, as an embedding's
            chunk.move(State.COMPUTE)
            chunk.move(State.HOLD_AFTER_BACKWARD)
        chunk.move(State.READY_FOR_REDUCE)

    def settle(self, gradients: Tensor, index: int, slots: list[int]) -> None:
        """The gradients have landed: add them to the parameters' `.grad`."""
        chunk = self.chunks[index]
        if index in self._staged:
            staging, arrival = self._staged.pop(index)
            self.copies.finish(arrival)
            chunk.accumulate(staging[: gradients.numel()], slots)
            self._staging[gradients.dtype].append(staging)
        else:
            chunk.accumulate(gradients, slots)
        if not self.placing.on_device(index):
            self.stats.moved(to_host=gradients.nbytes)
        self._hold(chunk)

    def _take_staging(self, gradients: Tensor) -> Tensor:
        free = self._staging.setdefault(gradients.dtype, [])
        fitting = [buffer for buffer in free if buffer.numel() >= gradients.numel()]
        if not fitting:
            self.placing.host_tier.charge(gradients.nbytes, "staging for gradients")
            return host_buffer(gradients.numel(), gradients.dtype, pinned=True)
        smallest = min(fitting, key=Tensor.numel)
        free[:] = [buffer for buffer in free if buffer is not smallest]
        return smallest

    # -- ranks ---------------------------------------------------------------------------------------------

    def average(self, value: Tensor) -> Tensor:
        """The mean of a value over the ranks."""
        return self.ranks.average_(value.clone())

    @staticmethod
    def share(loss: Tensor, count: Tensor, average: Tensor) -> Tensor:
        """A mean over `count` tokens as a part of the mean over all ranks' tokens, `average` on each; 0 without any."""
        return torch.where(count == 0, torch.zeros_like(loss), loss * (count / average).to(loss.dtype))

    # -- random numbers ------------------------------------------------------------------------------------

    def save_rng(self, like: Tensor) -> Tensor:
        """The state of the generator that the next random operator draws from."""
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def swap_rng(self, state: Tensor) -> None:
        """Exchange the generator's state with `state`."""
        self._apart = None if self._apart is state else state
        current = self.save_rng(state)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)
        state.copy_(current)

    def fork_rng(self, like: Tensor, axes: list[str]) -> Tensor:
        """A state of the generator for each place on these axes of the mesh."""
        return fork(self.device, tuple(self.ranks.mesh.coordinate(self.ranks.rank, axis) for axis in axes))

    # -- steps ---------------------------------------------------------------------------------------------

    def versions(self) -> dict[str, int]:
        """How often each parameter was written, by name."""
        return self.placing.store.versions()

    def begin_backward(self) -> float:
        """Called before the instructions of a backward; returns what to multiply its gradients by."""
        self.placing.prepare_gradients()
        return 1.0

    def finish(self) -> None:
        """Block until updates under way are done; a torch optimizer's are when its `step()` returns."""

    @property
    def host_update_s(self) -> float:
        """How long the host's updates beside programs took so far."""
        return 0.0

    def leave(self) -> None:
        """Give all memory back to the tiers: another machine takes over."""
        for free in self._staging.values():
            self.placing.host_tier.refund(sum(buffer.nbytes for buffer in free))
        self._staging.clear()
        self.placing.leave()

    # -- recovery ------------------------------------------------------------------------------------------

    def abort(self) -> str:
        """Forget a step that failed half way. Masters are as before it; gradients may be of a part of it.

        Returns what to tell the user of the state that is left.
        """
        self.exchange.abandon()
        self.copies.join()  # copies under way still write to what the program's death has freed
        for chunk in self.chunks:
            chunk.rest()
        for staging, arrival in self._staged.values():
            self.copies.finish(arrival)
            self._staging[staging.dtype].append(staging)
        self._staged.clear()
        if self._apart is not None:  # ranks would draw apart from here on
            self.swap_rng(self._apart)
        self.run = Run()
        return "Parameters and optimizer state are as before the step; call zero_grad() before the next one."
