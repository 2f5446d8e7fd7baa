"""Masters for torch's optimizers: real parameters, which any element-wise optimizer updates in its own `step()`."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor, nn

from ..distributed.ranks import ALONE, Ranks
from ..distributed.reduction import all_reduce_
from ..isa.errors import StateError
from ..isa.formats import TorchFormat
from ..isa.homes import Home, Homes
from ..isa.layout import Slot
from .chunks import Chunk, ChunkStore
from .hardware import Hardware
from .state_store import PARTIAL, Run
from .stats import Stats
from .stored import Stored
from .streams import Arrival


class TorchStore:
    """A store whose training state is the masters, their gradients, and the optimizer's state.

    The optimizer itself allocates its state, beside each master. It is booked here with the chunk, so that no tier
    promises memory that the first optimizer step will take.
    """

    loss_scale = 1.0
    host_update_s = 0.0  # the optimizer updates in its step(), while no program runs
    is_between_steps = True  # only the training loop knows whether `.grad` is pending

    def __init__(self, chunks: ChunkStore, hardware: Hardware, format: TorchFormat, stats: Stats,
                 ranks: Ranks = ALONE) -> None:  # fmt: skip
        self.chunks = chunks
        self.hardware = hardware
        self.format = format
        self.stats = stats
        self.ranks = ranks
        self.copies = hardware.new_copies()
        self.homes: dict[int, Home] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._staged: dict[int, tuple[Tensor, Arrival]] = {}
        self._staging: dict[torch.dtype, list[Tensor]] = {}
        self._added: dict[int, int | None] = {}  # chunks that this backward added to: versions of their gradients

    # -- placement -----------------------------------------------------------------------------------------

    def place(self, homes: Homes) -> None:
        """Moves masters and makes or drops resident copies; values stay. Raises BudgetError on a full tier."""
        self.chunks.let_go()
        with self.hardware.placing():
            self._place(homes)

    def _place(self, homes: Homes) -> None:
        pairs = list(zip(self.chunks.chunks, homes, strict=True))
        for chunk, home in pairs:  # make room first
            if chunk.resident is not None and not self.format.keeps_copy(chunk.layout, home):
                chunk.resident = None
                self._book(chunk, Home(self.homes[chunk.layout.index].where))
        for chunk, home in pairs:
            before = self.homes.get(chunk.layout.index)
            is_other = chunk.master is not None and chunk.master.dtype != chunk.layout.master_dtype  # trained since
            if before is None or before.on_device != home.on_device or is_other:
                self._place_master(chunk, Home(home.where, chunk.resident is not None))
        for chunk, home in pairs:
            self._book(chunk, home, purpose="the weights")
            if chunk.resident is None and self.format.keeps_copy(chunk.layout, home):
                chunk.resident = self.hardware.zeros(chunk.layout.numel, chunk.layout.dtype, on_device=True)
            self.homes[chunk.layout.index] = home

    def leave(self) -> None:
        self._staging.clear()
        self._book_staging()
        for chunk in self.chunks.chunks:
            self.hardware.book(chunk.layout.name, 0, 0, "")
            chunk.master = chunk.gradient = chunk.cast = chunk.resident = None
        self.homes.clear()

    def _place_master(self, chunk: Chunk, home: Home) -> None:
        layout, hardware = chunk.layout, self.hardware
        before = self.homes.get(layout.index)
        # Both places are in use while values move from one to the other.
        left = [each for each in (chunk.master, chunk.gradient, chunk.cast) if each is not None]
        self._book(chunk, home, sum(each.nbytes for each in left), before)
        streams = not home.on_device
        master = hardware.zeros(layout.numel, layout.master_dtype, home.on_device, streams and not layout.casts)
        self.chunks.place(chunk, master)
        chunk.gradient = None
        chunk.cast = hardware.zeros(layout.numel, layout.dtype, False, True) if layout.casts and streams else None
        self._book(chunk, home)
        self.homes[layout.index] = home

    def _book(self, chunk: Chunk, home: Home, left_bytes: int = 0, before: Home | None = None,
              purpose: str = "the training state") -> None:  # fmt: skip
        """Accounts for a chunk at `home` and, while it moves, for the bytes that are left where it was `before`."""
        layout, was_on_device = chunk.layout, before is not None and before.on_device
        device = self.format.device_bytes(layout, home) + left_bytes * was_on_device
        host = self.format.host_bytes(layout, home) + left_bytes * (not was_on_device)
        self.hardware.book(layout.name, device, host, f"{purpose} of {layout.name}")

    # -- weights -------------------------------------------------------------------------------------------

    def fetch(self, chunk: Chunk, run: Run) -> Tensor:
        index = chunk.layout.index
        assert chunk.master is not None
        if self.homes[index].on_device:
            if not chunk.layout.casts:
                return chunk.master
            return self._device_copy(chunk).copy_(chunk.master)
        if chunk.resident is not None and index in run.refreshed:
            return chunk.resident
        target = self._device_copy(chunk)
        self._arrivals[index] = self.copies.to_device(target, self._host_source(chunk, run))
        self.stats.moved(to_device=target.nbytes)
        run.refreshed.add(index)
        return target

    def _device_copy(self, chunk: Chunk) -> Tensor:
        if chunk.resident is not None:
            return chunk.resident
        return torch.empty(chunk.layout.numel, dtype=chunk.layout.dtype, device=self.hardware.device)

    def _host_source(self, chunk: Chunk, run: Run) -> Tensor:
        """The host tensor to copy from. A cast copy is made anew from the master in every run: an optimizer may write
        masters in ways that leave no trace, and stale weights would train wrongly without an error."""
        assert chunk.master is not None
        if chunk.cast is None:
            return chunk.master
        if chunk.layout.index not in run.refreshed:
            self.copies.finish(self._arrivals.get(chunk.layout.index))
            chunk.cast.copy_(chunk.master)
        return chunk.cast

    def arrive(self, chunk: Chunk, weights: Tensor) -> None:
        self.copies.arrive(self._arrivals.get(chunk.layout.index))

    def release(self, chunk: Chunk) -> None:
        """Nothing to do: a copy that is not resident is freed with its last reference."""

    def stays(self, chunk: Chunk) -> bool:
        return chunk.resident is not None or self.homes[chunk.layout.index].on_device

    # -- gradients -----------------------------------------------------------------------------------------

    def gradients(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self.hardware.device)

    def reduce(self, chunk: Chunk, gradients: Tensor, slots: list[int]) -> None:
        all_reduce_(gradients, chunk.layout, self.ranks)
        if self.hardware.is_cuda and not self.homes[chunk.layout.index].on_device:
            staging = self._take_staging(gradients)
            arrival = self.copies.to_host(staging[: gradients.numel()], gradients)
            self._staged[chunk.layout.index] = staging, arrival

    def accumulate_grad(self, chunk: Chunk, gradients: Tensor, slots: list[int]) -> None:
        """Adds the gradients to the parameters' `.grad`, once they have landed."""
        self._added[chunk.layout.index] = None
        if chunk.layout.index in self._staged:
            staging, arrival = self._staged[chunk.layout.index]
            self.copies.finish(arrival)
            chunk.accumulate(staging[: gradients.numel()], slots)
            self._free_staging(chunk.layout.index)
        else:
            chunk.accumulate(gradients, slots)
        self._added[chunk.layout.index] = chunk.gradient_version
        if not self.homes[chunk.layout.index].on_device:
            self.stats.moved(to_host=gradients.nbytes)

    def _take_staging(self, gradients: Tensor) -> Tensor:
        """A pinned host buffer for the gradients: the smallest free one that fits, else a new one."""
        free = self._staging.setdefault(gradients.dtype, [])
        fitting = [buffer for buffer in free if buffer.numel() >= gradients.numel()]
        if not fitting:
            self._book_staging(gradients.nbytes)
            return self.hardware.zeros(gradients.numel(), gradients.dtype, False, True)
        smallest = min(fitting, key=Tensor.numel)
        free[:] = [buffer for buffer in free if buffer is not smallest]  # remove() would compare elements
        return smallest

    def _free_staging(self, index: int) -> None:
        staging, _ = self._staged.pop(index)
        self._staging[staging.dtype].append(staging)

    def _book_staging(self, more: int = 0) -> None:
        """Accounts for all staging buffers and `more` bytes."""
        buffers = [*chain(*self._staging.values()), *(staging for staging, _ in self._staged.values())]
        self.hardware.host_tier.book("staging for gradients", sum(buffer.nbytes for buffer in buffers) + more)

    # -- steps ---------------------------------------------------------------------------------------------

    def begin_backward(self) -> float:
        """Prepares gradient buffers beside the masters, which were booked when the chunks were placed.

        Raises StateError if `.grad` still holds those of an unfinished backward.
        """
        for index, version in self._added.items():
            chunk = self.chunks.chunks[index]
            if chunk.gradient_version == version and chunk.has_gradients:
                raise StateError(PARTIAL)
        self._added.clear()
        for chunk in self.chunks.chunks:
            if chunk.layout.trainable:
                chunk.prepare_gradient()
        return 1.0

    def end_backward(self) -> None:
        self._added.clear()

    def rest(self) -> None:
        """Waits for copies that read the masters directly: these may be written to afterwards."""
        for chunk in self.chunks.chunks:
            if not chunk.layout.casts:
                self.copies.finish(self._arrivals.pop(chunk.layout.index, None))

    def finish(self) -> None:
        """Nothing to wait for: a torch optimizer's updates are done when its `step()` returns."""

    def abort(self, run: Run) -> str:
        """Releases the staging buffers. Masters are as before the run; gradients may be incomplete."""
        for index, (_, arrival) in list(self._staged.items()):
            self.copies.finish(arrival)
            self._free_staging(index)
        self._book_staging()
        self._added = {index: self.chunks.chunks[index].gradient_version for index in self._added}
        return "Parameters and optimizer state are as before the step; call zero_grad() before the next one."

    def stale(self) -> str:
        return "Call backward() first, or call the model again"

    # -- parameters ----------------------------------------------------------------------------------------

    def versions(self) -> dict[str, int]:
        return self.chunks.versions()

    def adopt(self) -> None:
        self.chunks.adopt()

    def writable(self) -> AbstractContextManager[None]:
        """Lifts the ban on writing to parameters of other processes; the others may be written at any time."""
        return self.chunks.writers.writing()

    def zero_grad(self, set_to_none: bool) -> None:
        for _, parameter in self._parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.requires_grad_(False).zero_()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        norms, local_shards = [torch.zeros((), device=self.hardware.device)], self.chunks.local_shards
        for slot, parameter in self._parameters():
            if parameter.grad is not None and self.chunks.ownership.counts(slot.name):
                norm = torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32)
                norms.append(norm.to(self.hardware.device) / math.sqrt(local_shards.replicas(slot)))
        total = self.chunks.ownership.norm(local_shards.norm(torch.linalg.vector_norm(torch.stack(norms))))
        nn.utils.clip_grads_with_norm_([p for _, p in self._parameters()], max_norm, total)
        return total

    def stored_master(self, parameter: str) -> Stored:
        if parameter in self.chunks.elsewhere:
            return self.chunks.elsewhere[parameter].stored
        layout, number = self.chunks.place_of(parameter)
        slot, master = layout.slots[number], self.chunks.chunks[layout.index].master
        assert master is not None
        return Stored.of(master, self.chunks.local_shards.whole_shape(slot), self.chunks.local_shards.regions(slot))

    def masters_written(self) -> None:
        """Nothing to do: programs copy from the masters in every run."""

    def _parameters(self) -> Iterator[tuple[Slot, nn.Parameter]]:
        for chunk in self.chunks.chunks:
            yield from zip(chunk.layout.slots, chunk.parameters, strict=True)
