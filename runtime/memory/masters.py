"""Puts chunks where a plan wants them, and keeps the account of what lies on which tier for good."""

import torch

from ..isa.layout import ChunkLayout, TorchUpdates
from .chunks import Chunk, ChunkStore
from .streams import host_buffer
from .tiers import Tier


class Placing:
    """Where each chunk's training state lies.

    The optimizer's state is the optimizer's to allocate, beside each master; it is charged here, with the
    chunk, so that no tier promises memory that the first optimizer step would take.
    """

    def __init__(self, store: ChunkStore, device: torch.device, tiers: tuple[Tier, Tier],
                 updates: TorchUpdates) -> None:  # fmt: skip
        self.store = store
        self.device = device
        self.device_tier, self.host_tier = tiers
        self.updates = updates
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

    def leave(self) -> None:
        """Give all back to the tiers: another placing takes over. The parameters keep their values."""
        for index, chunk in enumerate(self.store.chunks):
            if index in self._on_device:
                on_device = self._on_device.pop(index)
                tier = self.device_tier if on_device else self.host_tier
                tier.refund(self._charged_bytes(chunk.layout, on_device))
            if chunk.resident is not None:
                self.device_tier.refund(chunk.layout.compute_bytes)
            chunk.master = chunk.gradient = chunk.cast = chunk.resident = None

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
        return self.updates.device_bytes(layout) if on_device else self.updates.host_bytes(layout)
