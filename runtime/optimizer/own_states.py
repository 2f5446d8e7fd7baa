"""Puts training states where a plan wants them, and accounts for the memory they take on either side."""

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
    """The training states of all chunks, by chunk index.

    A chunk's weights are on the device if its state is, or if the chunk is resident and updated there. For any other
    resident chunk the device holds a copy, made anew after each update.

    For divided chunks the states are those of this process's shards (see `Zero`), while programs compute with the whole
    chunk: with a resident copy, which contains the shard's weights if these are on the device, or with one that is
    gathered for each use.
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
        """A chunk's parameters, for messages."""
        return self._states[index].name

    def place(self, homes: Homes) -> None:
        """Makes or moves the states, with their values and gradients. Raises BudgetError on a full tier: states moved
        by then are in their new homes, the others where they were."""
        pairs = list(zip(self.chunks.chunks, homes, strict=True))
        for chunk, home in pairs[len(self._states) :]:
            self._place(chunk, home)
        leaving = [(chunk, home) for chunk, home in pairs if not self._is_at(chunk, home)]
        for chunk, home in sorted(leaving, key=lambda pair: self._more_bytes(*pair)):  # those that free memory first
            self._move(chunk, home)

    def _is_at(self, chunk: Chunk, home: Home) -> bool:
        state, layout = self._states[chunk.layout.index], chunk.layout
        return state.home == home and state.layout == layout.shard(self.zero.number(layout))

    def _more_bytes(self, chunk: Chunk, home: Home) -> int:
        """How many more bytes of device memory the chunk takes at `home` than where it is now."""
        now = self._states[chunk.layout.index].home
        return self.format.device_bytes(chunk.layout, home) - self.format.device_bytes(chunk.layout, now)

    def _move(self, chunk: Chunk, home: Home) -> None:
        """Moves a chunk's state; on failure restores what was booked for it."""
        name, tiers = chunk.layout.name, self.hardware.tiers
        before = [tier.booked(name) for tier in tiers]
        try:
            self._place(chunk, home)
        except BaseException:
            self._book_frozen(None)
            for tier, num_bytes in zip(tiers, before, strict=True):
                tier.restore(name, num_bytes)
            raise

    def _place(self, chunk: Chunk, home: Home) -> None:
        index, layout = chunk.layout.index, chunk.layout
        number = self.zero.number(layout)
        previous = self._states[index] if index < len(self._states) else None
        thaws = previous is not None and previous.layout != layout.shard(number)
        unplanned = previous is not None and previous.total is not None and not self.format.keeps_sum(layout)
        self._book(layout, home, home.on_device if unplanned else None)
        there, below, rest = self._on_device(chunk, previous), None, None
        if previous is not None and thaws:
            below, rest = self._kept(layout.shard(number), home, previous)
            self._book_frozen(previous, (there, below, rest))
        weights, whole = self._weights(layout, home, there, below)
        state = self._allocate(layout.shard(number), home, weights, rest)
        state.firsts = tuple(layout.held(slot, number).start for slot in range(len(layout.slots)))
        if unplanned:
            state.total = self._zeros(state.layout.numel, layout.master_dtype, home.on_device)
        if previous is None:
            self._take_parameters(state, chunk)
        elif thaws:
            self._take_frozen(state, previous, layout)
            self._book_frozen(None)
        else:
            state.take(previous)
        if whole is not None and home.where is Where.HOST:
            self.zero.own(whole, layout).copy_(state.weights)
        chunk.resident = whole if home.where is Where.HOST or layout.shards > 1 else None
        chunk.gathered = -1
        self._states[index] = state  # last, so that a move that is interrupted is made again

    def _take_frozen(self, state: ChunkState, frozen: ChunkState, layout: ChunkLayout) -> None:
        """Takes over the values of a chunk that was frozen, perhaps without a master and undivided, and the gradients
        that the user has assigned."""

        def mine(value: Tensor, slot: int) -> Tensor:
            is_mine = tuple(value.shape) == state.layout.slots[slot].shape
            return value if is_mine else self.zero.take(value, layout, slot)

        for slot in range(len(state.layout.slots)):
            state.write(slot, mine(frozen.read(slot), slot))
            if frozen.added and frozen.total is not None and state.total is not None:
                state.slice(state.total, slot).copy_(mine(frozen.slice(frozen.total, slot), slot))
        state.steps, state.version = frozen.steps, frozen.version + 1
        state.present, state.added = frozen.present, frozen.added

    def _book_frozen(self, state: ChunkState | None, kept: tuple[Tensor | None, ...] = ()) -> None:
        """Accounts for a frozen state, but for tensors that are `kept`, beside the one that takes its place, until that
        has its values."""
        left = {True: 0, False: 0}  # on the device, on the host
        if state is not None:
            home = state.home
            sides = (state.weights, home.weights_on_device), *((each, home.on_device) for each in state.beside_weights)
            for tensor, on_device in sides:
                left[on_device] += tensor.nbytes * all(tensor is not other for other in kept)
        self.hardware.book("a frozen state", left[True], left[False], "the weights of a chunk that is trained now")

    def make_total(self, state: ChunkState) -> Tensor:
        """The sum of gradients, allocated now if it was not planned for: beside the state, or on the host if the device
        is full. Raises BudgetError if the host is full, too."""
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
            f"float32 gradients of {layout.name} (accumulate= plans memory for them; clipping with max_grad_norm= or "
            "model.clip_grad_norm_() needs none)"
        )
        self._book(layout, state.home, on_device, purpose)
        return self._zeros(state.layout.numel, layout.master_dtype, on_device)

    def forget_gradient(self, state: ChunkState) -> None:
        """Drops a chunk's gradient. An unplanned sum is on the device only between backward and update."""
        layout = self.chunks.chunks[state.layout.index].layout
        if state.total is not None and state.where is Where.DEVICE and not self.format.keeps_sum(layout):
            state.total = None
            self._book(layout, state.home)
        state.forget_gradient()

    def _book(self, layout: ChunkLayout, home: Home, total_on_device: bool | None = None, purpose: str = "") -> None:
        """Accounts for a chunk's state and, unless `total_on_device` is None, for an unplanned sum of gradients on the
        device or on the host.

        A held gradient on the device is the program's own buffer, and counted with the program.
        """
        device, host = self.format.device_bytes(layout, home), self.format.host_bytes(layout, home)
        device += layout.master_bytes * (total_on_device is True)
        host += layout.master_bytes * (total_on_device is False)
        self.hardware.book(layout.name, device, host, purpose or f"the training state of {layout.name}")

    def _on_device(self, chunk: Chunk, state: ChunkState | None) -> Tensor | None:
        """The whole chunk's weights, where the device has them as long as the state stays where it is."""
        has_them = state is not None and state.home.weights_on_device and chunk.layout.shards == 1
        found = state.weights if state is not None and has_them else chunk.resident
        return found if found is not None and found.numel() == chunk.layout.numel else None

    def _kept(self, layout: ChunkLayout, home: Home, frozen: ChunkState) -> tuple[Tensor | None, Tensor | None]:
        """A frozen state's weights on the host, and what it has beside weights, if they may stay where they are."""
        if frozen.layout.numel != layout.numel:
            return None, None
        below = None if frozen.home.weights_on_device or home.weights_on_device else frozen.weights
        same = frozen.home.on_device == home.on_device and not home.streamed  # whose host memory is page-locked
        rest = frozen.rest if same and frozen.rest is not None else None
        return below, rest if rest is not None and rest.dtype == self.format.rest_dtype(layout) else None

    def _weights(self, layout: ChunkLayout, home: Home, there: Tensor | None,
                 below: Tensor | None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The weights of this process's shard, and for a resident chunk the whole weights; the former are a view of the
        latter unless they are on the host. Weights that are `there`, on the device, stay where they are, so that a
        state can leave a device that is full; `take` waits for what still reads them. So do those that are `below`, on
        the host."""
        whole = None
        if home.resident:
            whole = self._zeros(layout.numel, layout.dtype, True) if there is None else there
        if not home.weights_on_device:
            return self._zeros(layout.shard_numel, layout.dtype, False, pinned=True) if below is None else below, whole
        if whole is None:
            return self._zeros(layout.shard_numel, layout.dtype, True), None
        return self.zero.own(whole, layout), whole

    def _allocate(self, layout: ChunkLayout, home: Home, weights: Tensor, kept: Tensor | None) -> ChunkState:
        new = lambda dtype: self._zeros(layout.numel, dtype, home.on_device, pinned=home.streamed)  # noqa: E731
        stored = lambda dtype: self._zeros(  # noqa: E731
            stored_numel(dtype, layout.numel), dtype, home.on_device, pinned=home.streamed
        )
        rest, moments = self.format.rest_dtype(layout), tuple(map(stored, self.format.moment_dtypes(layout)))
        if layout.factor_numel:
            moments = (self._zeros(layout.factor_numel, layout.master_dtype, True),)
        state = ChunkState(
            layout, home, weights,
            rest=new(rest) if kept is None and rest is not None else kept,
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
        """Takes over the parameters' values and drops their storages, which are freed unless used elsewhere. Parameters
        on `meta` have no values yet."""
        given = [(slot, parameter) for slot, parameter in enumerate(chunk.parameters) if not parameter.is_meta]
        for slot, parameter in given:
            shard = self.chunks.local_shard(chunk.layout.slots[slot], parameter.detach())
            state.write(slot, self.zero.take(shard, chunk.layout, slot))
        self._states.append(state)  # from here on the values are read from the state
        for _, parameter in given:
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        chunk.master = chunk.gradient = chunk.cast = None

    def _zeros(self, numel: int, dtype: torch.dtype, on_device: bool, pinned: bool = False) -> Tensor:
        return self.hardware.zeros(numel, dtype, on_device, pinned)
