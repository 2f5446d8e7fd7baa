"""Puts chunks where a plan wants them, and keeps the account of what lies on which tier for good."""

import torch

from .chunks import Chunk, ChunkStore
from .layout import ChunkLayout
from .streams import host_buffer
from .tiers import Tier


def state_bytes(layout: ChunkLayout, optimizer_state_bytes: int) -> int:
    """Bytes of a chunk's whole training state: master, gradients in its dtype, optimizer state."""
    if not layout.trainable:
        return layout.master_bytes
    return 2 * layout.master_bytes + layout.numel * optimizer_state_bytes


def host_state_bytes(layout: ChunkLayout, optimizer_state_bytes: int) -> int:
    """What a chunk's training state takes on the host, the compute copy that streams included."""
    return state_bytes(layout, optimizer_state_bytes) + (layout.compute_bytes if layout.casts else 0)


class Placing:
    """Where each chunk's training state lies.

    The optimizer's state is the optimizer's to allocate, beside each master; it is charged here, with the
    chunk, so that no tier promises memory that the first optimizer step would take.
    """

    def __init__(self, store: ChunkStore, device: torch.device, tiers: tuple[Tier, Tier],
                 optimizer_state_bytes: int) -> None:  # fmt: skip
        self.store = store
        self.device = device
        self.device_tier, self.host_tier = tiers
        self.optimizer_state_bytes = optimizer_state_bytes
        self._on_device: dict[int, bool] = {}

    def place(self, masters: frozenset[int], weights: frozenset[int]) -> None:
        """Move masters and make or drop resident copies; values stay. Raises BudgetError on a full tier."""
        for index, chunk in enumerate(self.store.chunks):
            stays = index in weights and (chunk.layout.casts or index not in masters)
            if chunk.resident is not None and not stays:
                chunk.resident = None
                self.device_tier.refund(chunk.layout.compute_bytes)
        for index, chunk in enumerate(self.store.chunks):
            if self._on_device.get(index) is not (index in masters):
                self._place_master(chunk, index in masters)
        for index in weights:
            layout = self.store.chunks[index].layout
            if self.store.chunks[index].resident is None and (layout.casts or index not in masters):
                self.device_tier.charge(layout.compute_bytes, f"the weights of chunk {index}")
                resident = torch.empty(layout.numel, dtype=layout.dtype, device=self.device)
                self.store.chunks[index].resident = resident

    def on_device(self, index: int) -> bool:
        """Whether the chunk's master is on the device tier."""
        return self._on_device[index]

    def prepare_gradients(self) -> None:
        """Allocate the gradient buffers, beside the masters. They were charged when the chunk was placed."""
        for chunk in self.store.chunks:
            if chunk.layout.trainable:
                chunk.prepare_gradient()

    def _place_master(self, chunk: Chunk, on_device: bool) -> None:
        layout, index = chunk.layout, chunk.layout.index
        tier = self.device_tier if on_device else self.host_tier
        tier.charge(self._charged_bytes(layout, on_device), f"the training state of chunk {index}")
        pinned = self.device.type == "cuda" and not on_device
        if on_device:
            master = torch.zeros(layout.numel, dtype=layout.master_dtype, device=self.device)
        else:
            master = host_buffer(layout.numel, layout.master_dtype, pinned and not layout.casts)
        self.store.place(chunk, master)
        chunk.gradient = None
        chunk.cast = host_buffer(layout.numel, layout.dtype, pinned) if layout.casts and not on_device else None
        if index in self._on_device:
            other = self.host_tier if on_device else self.device_tier
            other.refund(self._charged_bytes(layout, not on_device))
        self._on_device[index] = on_device

    def _charged_bytes(self, layout: ChunkLayout, on_device: bool) -> int:
        charge = state_bytes if on_device else host_state_bytes
        return charge(layout, self.optimizer_state_bytes)
