"""Puts training states where a plan wants them: the counterpart of `placing` for our own optimizer."""

import torch
from torch import Tensor

from .chunks import Chunk, ChunkStore
from .errors import BudgetError
from .layout import ChunkLayout, Updates
from .states import ChunkState, Where, rest_dtype
from .streams import host_buffer
from .tiers import Tier


class StatePlacing:
    """Where each chunk's training state lies.

    A chunk's weights stay on the device where its state does, and where a resident chunk is updated there.
    Of any other resident chunk the device holds a copy, made anew after each update.
    """

    def __init__(self, store: ChunkStore, device: torch.device, tiers: tuple[Tier, Tier], updates: Updates) -> None:
        self.store = store
        self.device = device
        self.device_tier, self.host_tier = tiers
        self.updates = updates
        self.states: list[ChunkState] = []
        self._placed: dict[int, tuple[Where, bool]] = {}
        self._charged: dict[int, tuple[int, int]] = {}

    def place(self, masters: frozenset[int], weights: frozenset[int], streamed: frozenset[int]) -> None:
        """Make or move the states; values, gradients included, stay. Raises BudgetError on a full tier."""
        for chunk in self.store.chunks:
            index = chunk.layout.index
            where = Where.DEVICE if index in masters else Where.STREAMED if index in streamed else Where.HOST
            where = where if chunk.layout.trainable or where is Where.DEVICE else Where.HOST
            resident = index in weights and where is not Where.DEVICE
            if self._placed.get(index) != (where, resident):
                self._place(chunk, where, resident)

    def _place(self, chunk: Chunk, where: Where, resident: bool) -> None:
        index = chunk.layout.index
        previous = self.states[index] if index < len(self.states) else None
        unplanned = previous is not None and previous.total is not None and not self.updates.keeps_sum(chunk.layout)
        self._charge(chunk.layout, where, resident, unplanned)
        state = self._allocate(chunk.layout, where, resident)
        if unplanned:
            state.total = self._zeros(chunk.layout.numel, chunk.layout.master_dtype, where is Where.DEVICE)
        if previous is None:
            self._take_parameters(state, chunk)
            self.states.append(state)
        else:
            state.take(previous)
            self.states[index] = state
        self._placed[index] = where, resident
        chunk.resident = state.weights.to(self.device, copy=True) if resident and where is Where.HOST else None

    def on_device(self, index: int) -> bool:
        """Whether the chunk's own weights are on the device tier, so that programs compute with them."""
        where, resident = self._placed[index]
        return where is Where.DEVICE or (where is Where.STREAMED and resident)

    def make_total(self, state: ChunkState) -> Tensor:
        """The sum of gradients, made now where it was not planned for. Raises BudgetError on a full tier."""
        if state.total is None:
            layout, on_device = state.layout, state.where is Where.DEVICE
            tier = self.device_tier if on_device else self.host_tier
            tier.charge(layout.master_bytes, f"float32 gradients of chunk {layout.index} (accumulate= plans for them)")
            device, host = self._charged[layout.index]
            self._charged[layout.index] = (
                device + on_device * layout.master_bytes,
                host + (not on_device) * layout.master_bytes,
            )
            state.total = self._zeros(layout.numel, layout.master_dtype, on_device)
        return state.total

    def _charge(self, layout: ChunkLayout, where: Where, resident: bool, unplanned_total: bool) -> None:
        """Exchange the chunk's charges on both tiers, or, where one is full, on neither.

        A gradient that is held on the device is a program's own tensor, and counted with the program's.
        """
        total = layout.master_bytes if unplanned_total else 0
        if where is Where.DEVICE:
            held = self.updates.holds_gradient(layout) * layout.compute_bytes
            device, host = self.updates.device_bytes(layout) - held + total, 0
        else:
            device, host = (
                resident * layout.compute_bytes,
                self.updates.host_bytes(layout, where is Where.STREAMED) + total,
            )
        device_before, host_before = self._charged.get(layout.index, (0, 0))
        self.device_tier.charge(device - device_before, f"the training state of chunk {layout.index}")
        try:
            self.host_tier.charge(host - host_before, f"the training state of chunk {layout.index}")
        except BudgetError:
            self.device_tier.refund(device - device_before)
            raise
        self._charged[layout.index] = device, host

    def _allocate(self, layout: ChunkLayout, where: Where, resident: bool) -> ChunkState:
        on_device = where is Where.DEVICE
        pinned = self.device.type == "cuda" and where is Where.STREAMED
        new = lambda dtype: self._zeros(layout.numel, dtype, on_device, pinned)  # noqa: E731
        if on_device or (resident and where is Where.STREAMED):
            weights = self._zeros(layout.numel, layout.dtype, True)
        else:
            weights = self._zeros(layout.numel, layout.dtype, False, self.device.type == "cuda")
        rest = rest_dtype(layout)
        state = ChunkState(
            layout, where, weights,
            rest=None if rest is None else new(rest),
            moments=tuple(new(layout.master_dtype) for _ in range(self.updates.moments * layout.trainable)),
            steps=[0] * len(layout.slots),
        )  # fmt: skip
        if self.updates.keeps_sum(layout):
            state.total = new(layout.master_dtype)
        if not on_device and self.updates.lands_gradient(layout, where is Where.STREAMED):
            state.held = self._zeros(layout.numel, layout.dtype, False, self.device.type == "cuda")
        return state

    def _take_parameters(self, state: ChunkState, chunk: Chunk) -> None:
        """Take over values, and free the storages that held them as far as nobody else reads these."""
        for slot, parameter in enumerate(chunk.parameters):
            state.write(slot, self.store.part(chunk.layout.slots[slot], parameter.detach()))
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        chunk.master = chunk.gradient = chunk.cast = None

    def _zeros(self, numel: int, dtype: torch.dtype, on_device: bool, pinned: bool = False) -> Tensor:
        if on_device:
            return torch.zeros(numel, dtype=dtype, device=self.device)
        return host_buffer(numel, dtype, pinned)
