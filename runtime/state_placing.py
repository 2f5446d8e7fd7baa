"""Puts training states where a plan wants them: the counterpart of `placing` for our own optimizer."""

import torch
from torch import Tensor

from .chunks import Chunk, ChunkStore
from .layout import ChunkLayout, Updates
from .states import ChunkState, Where, has_total, rest_dtype
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
        self._charges: dict[int, tuple[int, int]] = {}

    def place(self, masters: frozenset[int], weights: frozenset[int], streamed: frozenset[int]) -> None:
        """Make or move the states; values stay. Raises BudgetError on a full tier."""
        for chunk in self.store.chunks:
            index = chunk.layout.index
            where = Where.DEVICE if index in masters else Where.STREAMED if index in streamed else Where.HOST
            where = where if chunk.layout.trainable or where is Where.DEVICE else Where.HOST
            resident = index in weights and where is not Where.DEVICE
            previous = self.states[index] if index < len(self.states) else None
            chunk.resident = None
            self._charge(chunk.layout, where, resident)
            state = self._allocate(chunk.layout, where, resident)
            if previous is None:
                self.states.append(state)
                _take_parameters(state, chunk)
            else:
                self.states[index] = state
                _take_state(state, previous)
            if resident and where is Where.HOST:
                chunk.resident = state.weights.to(self.device, copy=True)

    def on_device(self, index: int) -> bool:
        """Whether the chunk's own weights are on the device tier, so that programs compute with them."""
        state = self.states[index]
        return state.where is Where.DEVICE or (state.where is Where.STREAMED and self.is_resident(index))

    def is_resident(self, index: int) -> bool:
        return self._charges[index][0] > 0

    def make_total(self, state: ChunkState) -> Tensor:
        """The sum of gradients, made now where it was not planned for. Raises BudgetError on a full tier."""
        if state.total is None:
            layout, on_device = state.layout, state.where is Where.DEVICE
            tier = self.device_tier if on_device else self.host_tier
            tier.charge(layout.master_bytes, f"float32 gradients of chunk {layout.index} (accumulate= plans for them)")
            state.total = self._zeros(layout.numel, layout.master_dtype, on_device)
        return state.total

    def _charge(self, layout: ChunkLayout, where: Where, resident: bool) -> None:
        """Exchange the chunk's charges on both tiers."""
        device, host = self._charges.pop(layout.index, (0, 0))
        self.device_tier.refund(device)
        self.host_tier.refund(host)
        device = self.updates.device_bytes(layout) if where is Where.DEVICE else resident * layout.compute_bytes
        host = 0 if where is Where.DEVICE else self.updates.host_bytes(layout)
        self.device_tier.charge(device, f"the training state of chunk {layout.index}")
        self.host_tier.charge(host, f"the training state of chunk {layout.index}")
        self._charges[layout.index] = device, host

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
        if has_total(layout, self.updates):
            state.total = self._zeros(layout.numel, layout.master_dtype, on_device)
        if layout.trainable and not on_device:
            state.held = self._zeros(layout.numel, layout.dtype, False, self.device.type == "cuda")
        return state

    def _zeros(self, numel: int, dtype: torch.dtype, on_device: bool, pinned: bool = False) -> Tensor:
        if on_device:
            return torch.zeros(numel, dtype=dtype, device=self.device)
        return host_buffer(numel, dtype, pinned)


def _take_parameters(state: ChunkState, chunk: Chunk) -> None:
    """Take over values, and free the storages that held them as far as nobody else reads these."""
    for slot, parameter in enumerate(chunk.parameters):
        state.write(slot, parameter.detach())
        parameter.grad = None
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    chunk.master = chunk.gradient = chunk.cast = None


def _take_state(state: ChunkState, previous: ChunkState) -> None:
    for slot in range(len(state.layout.slots)):
        state.write(slot, previous.read(slot))
    for target, source in zip(state.moments, previous.moments, strict=True):
        target.copy_(source)
    state.steps = previous.steps


