"""Puts training states where a plan wants them: the counterpart of `placing` for our own optimizer."""

import torch
from torch import Tensor

from ..distributed.zero import ALONE, Zero
from ..isa.errors import BudgetError
from ..isa.layout import ChunkLayout, Updates
from ..memory.chunks import Chunk, ChunkStore
from ..memory.streams import host_buffer
from ..memory.tiers import Tier
from .states import ChunkState, Where, rest_dtype


class StatePlacing:
    """Where each chunk's training state lies.

    A chunk's weights stay on the device where its state does, and where a resident chunk is updated there.
    Of any other resident chunk the device holds a copy, made anew after each update.

    Of chunks that are divided the states here are those of this process's shards, and programs compute with the
    whole: with a resident copy, of which the shard's weights are a part where they are on the device, or with one
    that is gathered for each use.
    """

    def __init__(self, store: ChunkStore, device: torch.device, tiers: tuple[Tier, Tier], updates: Updates,
                 zero: Zero = ALONE) -> None:  # fmt: skip
        self.store = store
        self.device = device
        self.device_tier, self.host_tier = tiers
        self.updates = updates
        self.zero = zero
        self.states: list[ChunkState] = []
        self._placed: dict[int, tuple[Where, bool]] = {}
        self._charged: dict[int, tuple[int, int]] = {}

    def place(self, masters: frozenset[int], weights: frozenset[int], streamed: frozenset[int]) -> None:
        """Make or move the states; values, gradients included, stay. Raises BudgetError on a full tier."""
        for chunk in self.store.chunks:
            index = chunk.layout.index
            where = Where.DEVICE if index in masters else Where.STREAMED if index in streamed else Where.HOST
            where = where if chunk.layout.trainable or where is Where.DEVICE else Where.HOST
            resident = index in weights and (where is not Where.DEVICE or chunk.layout.shards > 1)
            if self._placed.get(index) != (where, resident):
                self._place(chunk, where, resident)

    def _place(self, chunk: Chunk, where: Where, resident: bool) -> None:
        index = chunk.layout.index
        previous = self.states[index] if index < len(self.states) else None
        unplanned = previous is not None and previous.total is not None and not self.updates.keeps_sum(chunk.layout)
        self._charge(chunk.layout, where, resident, unplanned)
        weights, whole = self._weights(chunk.layout, where, resident)
        state = self._allocate(chunk.layout.shard(self.zero.number(chunk.layout)), where, weights)
        if unplanned:
            state.total = self._zeros(state.layout.numel, chunk.layout.master_dtype, where is Where.DEVICE)
        if previous is None:
            self._take_parameters(state, chunk)
            self.states.append(state)
        else:
            state.take(previous)
            self.states[index] = state
        if whole is not None and where is Where.HOST:
            self.zero.own(whole, chunk.layout).copy_(state.weights)
        self._placed[index] = where, resident
        chunk.resident = whole if where is Where.HOST or chunk.layout.shards > 1 else None
        chunk.gathered = -1

    def weights_on_device(self, index: int) -> bool:
        """Whether the weights of the chunk's state are on the device tier."""
        where, resident = self._placed[index]
        return where is Where.DEVICE or (where is Where.STREAMED and resident)

    def on_device(self, index: int) -> bool:
        """Whether programs compute with the very weights of the chunk's state."""
        return self.weights_on_device(index) and self.store.chunks[index].layout.shards == 1

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
            held = self.updates.holds_gradient(layout) * layout.shard_bytes
            others = resident * (layout.compute_bytes - layout.shard_bytes)
            device, host = self.updates.device_bytes(layout) - held + others + total, 0
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

    def _weights(self, layout: ChunkLayout, where: Where, resident: bool) -> tuple[Tensor, Tensor | None]:
        """The weights of this process's shard, and all of a resident chunk's, of which they are a view unless they
        are on the host."""
        whole = self._zeros(layout.numel, layout.dtype, True) if resident else None
        if where is Where.HOST or (where is Where.STREAMED and whole is None):
            return self._zeros(layout.shard_numel, layout.dtype, False, self.device.type == "cuda"), whole
        return self._zeros(layout.shard_numel, layout.dtype, True) if whole is None else self.zero.own(
            whole, layout
        ), whole

    def _allocate(self, layout: ChunkLayout, where: Where, weights: Tensor) -> ChunkState:
        on_device = where is Where.DEVICE
        pinned = self.device.type == "cuda" and where is Where.STREAMED
        new = lambda dtype: self._zeros(layout.numel, dtype, on_device, pinned)  # noqa: E731
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
            part = self.store.part(chunk.layout.slots[slot], parameter.detach())
            state.write(slot, self.zero.take(part, chunk.layout, slot))
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        chunk.master = chunk.gradient = chunk.cast = None

    def _zeros(self, numel: int, dtype: torch.dtype, on_device: bool, pinned: bool = False) -> Tensor:
        if on_device:
            return torch.zeros(numel, dtype=dtype, device=self.device)
        return host_buffer(numel, dtype, pinned)
