"""Puts training states where a plan wants them, and keeps the account of what they take on either side."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..distributed.zero import ALONE, Zero
from ..isa.errors import BudgetError
from ..isa.formats import OwnFormat
from ..isa.homes import Home, Homes, Where
from ..isa.layout import ChunkLayout
from ..isa.moments import stored_numel
from ..memory.chunks import Chunk, ChunkStore
from ..memory.hardware import Hardware
from .states import ChunkState, StateSlice


class OwnStates:
    """The training states of all chunks, by number, and where each of them lies.

    A chunk's weights stay on the device where its state does, and where a resident chunk is updated there.
    Of any other resident chunk the device holds a copy, made anew after each update.

    Of chunks that are divided the states here are those of this process's shards, and programs compute with the
    whole: with a resident copy, of which the shard's weights are a part where they are on the device, or with one
    that is gathered for each use.
    """

    def __init__(self, chunks: ChunkStore, hardware: Hardware, format: OwnFormat, zero: Zero = ALONE) -> None:
        self.chunks = chunks
        self.hardware = hardware
        self.format = format
        self.zero = zero
        self._states: list[ChunkState] = []

    def __getitem__(self, index: int) -> ChunkState:
        return self._states[index]

    def __iter__(self) -> Iterator[ChunkState]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def name_of(self, index: int) -> str:
        """A chunk by its parameters, for messages."""
        return self._states[index].name

    def place(self, homes: Homes) -> None:
        """Make or move the states; values, gradients included, stay. Raises BudgetError on a full tier: then those that
        were moved until then are where they belong, and the others where they were."""
        pairs = list(zip(self.chunks.chunks, homes, strict=True))
        for chunk, home in pairs[len(self._states) :]:
            self._place(chunk, home)
        leaving = [(chunk, home) for chunk, home in pairs if self._states[chunk.layout.index].home != home]
        for chunk, home in sorted(leaving, key=lambda pair: self._more_bytes(*pair)):  # first those that make room
            self._move(chunk, home)

    def _more_bytes(self, chunk: Chunk, home: Home) -> int:
        """What a chunk takes more of the device there than where it is."""
        now = self._states[chunk.layout.index].home
        return self.format.device_bytes(chunk.layout, home) - self.format.device_bytes(chunk.layout, now)

    def _move(self, chunk: Chunk, home: Home) -> None:
        """Where there is no room, the account is as it was."""
        name, tiers = chunk.layout.name, self.hardware.tiers
        before = [tier.booked(name) for tier in tiers]
        try:
            self._place(chunk, home)
        except BaseException:
            for tier, num_bytes in zip(tiers, before, strict=True):
                tier.restore(name, num_bytes)
            raise

    def _place(self, chunk: Chunk, home: Home) -> None:
        index, layout = chunk.layout.index, chunk.layout
        previous = self._states[index] if index < len(self._states) else None
        unplanned = previous is not None and previous.total is not None and not self.format.keeps_sum(layout)
        self._book(layout, home, home.on_device if unplanned else None)
        weights, whole = self._weights(layout, home)
        number = self.zero.number(layout)
        state = self._allocate(layout.shard(number), home, weights)
        state.firsts = tuple(layout.held(slot, number).start for slot in range(len(layout.slots)))
        if unplanned:
            state.total = self._zeros(state.layout.numel, layout.master_dtype, home.on_device)
        if previous is None:
            self._take_parameters(state, chunk)
        else:
            state.take(previous)
        if whole is not None and home.where is Where.HOST:
            self.zero.own(whole, layout).copy_(state.weights)
        chunk.resident = whole if home.where is Where.HOST or layout.shards > 1 else None
        chunk.gathered = -1
        self._states[index] = state  # last: what is interrupted until here is done again

    def make_total(self, state: ChunkState) -> Tensor:
        """The sum of gradients, made now where it was not planned for: beside the state, or, where a device has no
        room, on the host. Raises BudgetError where that is full, too."""
        if state.total is None and state.where is Where.DEVICE:
            try:
                state.total = self._unplanned_total(state, True)
            except (BudgetError, torch.cuda.OutOfMemoryError):
                state.total = self._unplanned_total(state, False)
        elif state.total is None:
            state.total = self._unplanned_total(state, False)
        return state.total

    def _unplanned_total(self, state: ChunkState, on_device: bool) -> Tensor:
        layout = self.chunks.chunks[state.layout.index].layout
        purpose = (
            f"float32 gradients of {layout.name} (accumulate= plans for them, and clipping by max_grad_norm= or "
            "model.clip_grad_norm_() needs none)"
        )
        self._book(layout, state.home, on_device, purpose)
        return self._zeros(state.layout.numel, layout.master_dtype, on_device)

    def forget_gradient(self, state: ChunkState) -> None:
        """Drop a chunk's gradient. The device has room for an unplanned sum between backward and update alone."""
        layout = self.chunks.chunks[state.layout.index].layout
        if state.where is Where.DEVICE and not self.format.keeps_sum(layout):
            state.total = None
            self._book(layout, state.home)
        state.forget_gradient()

    def _book(self, layout: ChunkLayout, home: Home, total_on_device: bool | None = None, purpose: str = "") -> None:
        """Account for a chunk's state, and for an unplanned sum of gradients where there is one: on the device or not.

        A gradient that is held on the device is a program's own tensor, and counted with the program's.
        """
        device, host = self.format.device_bytes(layout, home), self.format.host_bytes(layout, home)
        device += layout.master_bytes * (total_on_device is True)
        host += layout.master_bytes * (total_on_device is False)
        self.hardware.book(layout.name, device, host, purpose or f"the training state of {layout.name}")

    def _weights(self, layout: ChunkLayout, home: Home) -> tuple[Tensor, Tensor | None]:
        """The weights of this process's shard, and all of a resident chunk's, of which they are a view unless they
        are on the host."""
        whole = self._zeros(layout.numel, layout.dtype, True) if home.resident else None
        if not home.weights_on_device:
            return self._zeros(layout.shard_numel, layout.dtype, False, pinned=True), whole
        if whole is None:
            return self._zeros(layout.shard_numel, layout.dtype, True), None
        return self.zero.own(whole, layout), whole

    def _allocate(self, layout: ChunkLayout, home: Home, weights: Tensor) -> ChunkState:
        new = lambda dtype: self._zeros(layout.numel, dtype, home.on_device, pinned=home.streamed)  # noqa: E731
        stored = lambda dtype: self._zeros(  # noqa: E731
            stored_numel(dtype, layout.numel), dtype, home.on_device, pinned=home.streamed
        )
        rest, moments = self.format.rest_dtype(layout), tuple(map(stored, self.format.moment_dtypes(layout)))
        if layout.factor_numel:
            moments = (self._zeros(layout.factor_numel, layout.master_dtype, True),)
        state = ChunkState(
            layout, home, weights,
            rest=None if rest is None else new(rest),
            moments=moments,
            steps=[0] * len(layout.slots),
        )  # fmt: skip
        if self.format.has_spare(layout, home):
            spare_weights = self._zeros(layout.numel, layout.dtype, False, pinned=True)
            spare_rest = None if rest is None else new(rest)
            state.spare = StateSlice(spare_weights, spare_rest, tuple(map(stored, self.format.moment_dtypes(layout))))
        if self.format.keeps_sum(layout):
            state.total = new(layout.master_dtype)
        if self.format.lands(layout, home) and not self.format.shares_landing(layout, home):
            state.held = self._zeros(layout.numel, layout.dtype, False, pinned=True)
        return state

    def _take_parameters(self, state: ChunkState, chunk: Chunk) -> None:
        """Take over values, and free the storages that held them as far as nobody else reads these. What is on `meta`
        has none as yet."""
        given = [(slot, parameter) for slot, parameter in enumerate(chunk.parameters) if not parameter.is_meta]
        for slot, parameter in given:
            shard = self.chunks.local_shard(chunk.layout.slots[slot], parameter.detach())
            state.write(slot, self.zero.take(shard, chunk.layout, slot))
        self._states.append(state)  # from here on values are read there
        for _, parameter in given:
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        chunk.master = chunk.gradient = chunk.cast = None

    def _zeros(self, numel: int, dtype: torch.dtype, on_device: bool, pinned: bool = False) -> Tensor:
        return self.hardware.zeros(numel, dtype, on_device, pinned)
