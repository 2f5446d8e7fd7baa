"""Masters for torch's optimizers: real parameters, which any element-wise optimizer updates in its own `step()`."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..distributed.ranks import ALONE, Ranks
from ..distributed.reduction import all_reduce_
from ..isa.formats import TorchFormat
from ..isa.homes import Home, Homes
from ..isa.layout import Slot
from .chunks import Chunk, ChunkStore
from .hardware import Hardware
from .state_store import Run
from .stats import Stats
from .stored import Stored
from .streams import Arrival


class TorchStore:
    """The training state is the masters, their gradients, and what the optimizer keeps.

    The latter is the optimizer's to allocate, beside each master; it is charged here, with the chunk, so that no tier
    promises memory that the first optimizer step would take.
    """

    host_update_s = 0.0  # updates are the optimizer's own, and no program runs beside them

    def __init__(self, chunks: ChunkStore, hardware: Hardware, format: TorchFormat, stats: Stats,
                 ranks: Ranks = ALONE) -> None:  # fmt: skip
        self.chunks = chunks
        self.hardware = hardware
        self.format = format
        self.stats = stats
        self.ranks = ranks
        self.copies = hardware.new_copies()
        self.homes: dict[int, Home] = {}
        self._charged: dict[int, tuple[int, int]] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._staged: dict[int, tuple[Tensor, Arrival]] = {}
        self._staging: dict[torch.dtype, list[Tensor]] = {}

    # -- where it lies -------------------------------------------------------------------------------------

    def place(self, homes: Homes) -> None:
        """Move masters and make or drop resident copies; values stay. Raises BudgetError on a full tier."""
        pairs = list(zip(self.chunks.chunks, homes, strict=True))
        for chunk, home in pairs:  # first make room
            if chunk.resident is not None and not self.format.keeps_copy(chunk.layout, home):
                chunk.resident = None
                self._charge(chunk, Home(self.homes[chunk.layout.index].where))
        for chunk, home in pairs:
            before = self.homes.get(chunk.layout.index)
            if before is None or before.on_device != home.on_device:
                self._place_master(chunk, Home(home.where, chunk.resident is not None))
        for chunk, home in pairs:
            if chunk.resident is None and self.format.keeps_copy(chunk.layout, home):
                self._charge(chunk, home, purpose="the weights")
                chunk.resident = torch.empty(chunk.layout.numel, dtype=chunk.layout.dtype, device=self.hardware.device)
            self.homes[chunk.layout.index] = home

    def leave(self) -> None:
        for free in self._staging.values():
            self.hardware.host_tier.refund(sum(buffer.nbytes for buffer in free))
        self._staging.clear()
        for chunk in self.chunks.chunks:
            device, host = self._charged.pop(chunk.layout.index, (0, 0))
            self.hardware.device_tier.refund(device)
            self.hardware.host_tier.refund(host)
            chunk.master = chunk.gradient = chunk.cast = chunk.resident = None
        self.homes.clear()

    def _place_master(self, chunk: Chunk, home: Home) -> None:
        layout, hardware = chunk.layout, self.hardware
        before = self._charged.get(layout.index, (0, 0))
        self._charge(chunk, home, before)  # both places are taken while values move from one to the other
        streams = not home.on_device
        master = hardware.zeros(layout.numel, layout.master_dtype, home.on_device, streams and not layout.casts)
        self.chunks.place(chunk, master)
        chunk.gradient = None
        chunk.cast = hardware.zeros(layout.numel, layout.dtype, False, True) if layout.casts and streams else None
        self._charge(chunk, home)
        self.homes[layout.index] = home

    def _charge(self, chunk: Chunk, home: Home, besides: tuple[int, int] = (0, 0),
                purpose: str = "the training state") -> None:  # fmt: skip
        """Account for a chunk that is at `home`, and `besides`, instead of what was charged for it before."""
        layout, purpose = chunk.layout, f"{purpose} of chunk {chunk.layout.index}"
        device = self.format.device_bytes(layout, home) + besides[0]
        host = self.format.host_bytes(layout, home) + besides[1]
        device_before, host_before = self._charged.get(layout.index, (0, 0))
        self.hardware.device_tier.charge(device - device_before, purpose)
        self._charged[layout.index] = device, host_before
        self.hardware.host_tier.charge(host - host_before, purpose)
        self._charged[layout.index] = device, host

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
        """The host tensor that streams. It is made anew from the master once in every run: an optimizer
        may write masters in ways that leave no trace, and stale weights would train wrongly in silence."""
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
        """A copy that is not resident dies with its last name."""

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
        """The gradients have landed: add them to the parameters' `.grad`."""
        if chunk.layout.index in self._staged:
            staging, arrival = self._staged.pop(chunk.layout.index)
            self.copies.finish(arrival)
            chunk.accumulate(staging[: gradients.numel()], slots)
            self._staging[gradients.dtype].append(staging)
        else:
            chunk.accumulate(gradients, slots)
        if not self.homes[chunk.layout.index].on_device:
            self.stats.moved(to_host=gradients.nbytes)

    def _take_staging(self, gradients: Tensor) -> Tensor:
        free = self._staging.setdefault(gradients.dtype, [])
        fitting = [buffer for buffer in free if buffer.numel() >= gradients.numel()]
        if not fitting:
            self.hardware.host_tier.charge(gradients.nbytes, "staging for gradients")
            return self.hardware.zeros(gradients.numel(), gradients.dtype, False, True)
        smallest = min(fitting, key=Tensor.numel)
        free[:] = [buffer for buffer in free if buffer is not smallest]  # remove() would compare elements
        return smallest

    # -- steps ---------------------------------------------------------------------------------------------

    def begin_backward(self) -> float:
        """Gradient buffers lie beside the masters; they were charged when the chunk was placed."""
        for chunk in self.chunks.chunks:
            if chunk.layout.trainable:
                chunk.prepare_gradient()
        return 1.0

    def rest(self) -> None:
        """Masters that are copied from as they are may not change before they have left."""
        for chunk in self.chunks.chunks:
            if not chunk.layout.casts:
                self.copies.finish(self._arrivals.pop(chunk.layout.index, None))

    def finish(self) -> None:
        """A torch optimizer's updates are done when its `step()` returns."""

    def abort(self, run: Run) -> str:
        """Masters are as before the run; gradients may be of a part of it."""
        for staging, arrival in self._staged.values():
            self.copies.finish(arrival)
            self._staging[staging.dtype].append(staging)
        self._staged.clear()
        return "Parameters and optimizer state are as before the step; call zero_grad() before the next one."

    def stale(self) -> str:
        return "Call backward() first, or call the model again"

    # -- parameters ----------------------------------------------------------------------------------------

    def versions(self) -> dict[str, int]:
        return self.chunks.versions()

    def adopt(self) -> None:
        self.chunks.adopt()

    def writable(self) -> AbstractContextManager[None]:
        return nullcontext()

    def zero_grad(self, set_to_none: bool) -> None:
        for _, parameter in self._parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.requires_grad_(False).zero_()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        norms, local_shards = [torch.zeros((), device=self.hardware.device)], self.chunks.local_shards
        for slot, parameter in self._parameters():
            if parameter.grad is not None:
                norm = torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32)
                norms.append(norm.to(self.hardware.device) / math.sqrt(local_shards.replicas(slot)))
        total = local_shards.norm(torch.linalg.vector_norm(torch.stack(norms)))
        nn.utils.clip_grads_with_norm_([p for _, p in self._parameters()], max_norm, total)
        return total

    def stored_master(self, parameter: str) -> Stored:
        layout, number = self.chunks.layout.places[parameter]
        slot, master = layout.slots[number], self.chunks.chunks[layout.index].master
        assert master is not None
        return Stored.of(master, self.chunks.local_shards.whole_shape(slot), self.chunks.local_shards.regions(slot))

    def masters_written(self) -> None:
        """Programs copy from the masters in every run."""

    def _parameters(self) -> Iterator[tuple[Slot, nn.Parameter]]:
        for chunk in self.chunks.chunks:
            yield from zip(chunk.layout.slots, chunk.parameters, strict=True)
