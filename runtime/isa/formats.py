"""StateFormat: what a chunk's training state consists of, and the bytes it takes on device and host and in transfers.

One format describes masters that any torch optimizer updates, the other our own optimizer's state, whose moments are
stored in one of several ways (`moments`). Planner, simulation, stores and reports all ask the format for bytes. If a
chunk is sharded, all numbers are those of one process's shard.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from . import whole_updates
from .homes import Home, Where
from .layout import ChunkLayout, Rule
from .moments import BLOCK, Masters, Moments, stored_bytes, stored_dtype, unit, update_bytes

STREAM_PIECE = 16 * 2**20
"""Elements of a streamed training state that move at a time: small enough to save memory, large enough for few
launches."""

SHORTEST_GRADIENT = 2 * BLOCK
"""Minimum length of a streamed gradient's buffer, in elements: a block's sum must fit, in a dtype twice as wide."""

STREAM_BUFFERS = 3
"""Pieces on the device at a time: one arrives, one is updated, one leaves."""

STREAMED_GRADIENTS = 2
"""How many gradients of streamed chunks may wait on the device for their update."""

LANDINGS = 3
"""Landings that chunks take turns in, for gradients used on arrival: one being filled, one waiting, one being read."""

Kind = tuple[torch.dtype, torch.dtype, Rule]
"""What chunks with the same make-up of state share: compute dtype, master dtype, update rule."""

Placed = Iterable[tuple[ChunkLayout, Home]]
"""Chunks, each with its home."""


class StateFormat(ABC):
    """What a chunk's training state consists of. Formats are frozen dataclasses; a plan's JSON has their fields and
    `kind`.

    If `beside` is true, updates run beside programs, chunk by chunk, and write new weights to wherever they are read.
    Otherwise all are made in the optimizer's `step()`, and programs copy from the masters themselves.
    """

    kind: ClassVar[str]
    beside: ClassVar[bool]
    in_backward: bool = False
    accumulate: int = 1
    stored: Moments = "exact"

    @property
    def at_once(self) -> bool:
        """Whether a complete gradient is used right away, where it is, without being held or added to others."""
        return self.in_backward and self.accumulate == 1

    @property
    def unit(self) -> int:
        """How many elements are updated together: slots and shards start at multiples of it."""
        return 1

    # -- between steps -------------------------------------------------------------------------------------

    @abstractmethod
    def wheres(self, chunk: ChunkLayout) -> tuple[Where, ...]:
        """The places where a chunk's training state may lie."""

    @abstractmethod
    def state_bytes(self, chunk: ChunkLayout) -> int:
        """Bytes of a chunk's training state if all of it is in one place, without buffers for transfers."""

    @abstractmethod
    def device_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        """Device bytes of a chunk between steps: its state, or the weights that stay."""

    def has_spare(self, chunk: ChunkLayout, home: Home) -> bool:
        """Whether the state has a spare: a second place where the next update is made before `step()`."""
        return False

    @abstractmethod
    def host_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        """Host bytes of a chunk, including the buffers that copies start from and that gradients land in."""

    # -- in a step -----------------------------------------------------------------------------------------

    def shares_landing(self, chunk: ChunkLayout, home: Home) -> bool:
        """Whether the chunk's gradients land on the host in one of the few buffers that chunks take turns in."""
        return False

    @abstractmethod
    def held_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        """Device bytes of a gradient, in the compute dtype, that stays there until its step is over."""

    @abstractmethod
    def passing_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        """Device bytes of the weights while a program reads them; 0 if they are on the device anyway."""

    @abstractmethod
    def stream_bytes(self, chunks: Placed) -> int:
        """Device bytes of the buffers through which the streamed states among `chunks` pass."""

    @abstractmethod
    def waiting_bytes(self, chunks: Placed) -> int:
        """Device bytes of gradients that wait for streamed states."""

    @abstractmethod
    def staging_bytes(self, chunks: Placed) -> int:
        """Host bytes of the landings that chunks share."""

    def working_bytes(self, chunks: Iterable[ChunkLayout]) -> int:
        """Device bytes that updates of whole parameters take while they run."""
        return 0

    # -- transfers and updates -----------------------------------------------------------------------------

    def travelling_bytes(self, chunk: ChunkLayout, home: Home) -> tuple[int, int]:
        """Bytes that one update of a streamed state copies, to the device and back."""
        return 0, 0

    def update_share(self, chunk: ChunkLayout) -> float:
        """Bytes that an update reads and writes, relative to an AdamW update with moments stored in the same way."""
        return 1.0

    def update_flop(self, chunk: ChunkLayout) -> float:
        """FLOPs of an update beyond the element-wise pass over its state."""
        return 0.0


@dataclass(frozen=True)
class TorchFormat(StateFormat):
    """State that any element-wise torch optimizer updates: a master, a gradient in the master's dtype, and the
    optimizer's own state, `optimizer_bytes` per element (AdamW: 8)."""

    optimizer_bytes: int = 8
    kind: ClassVar[str] = "torch"
    beside: ClassVar[bool] = False

    def __str__(self) -> str:
        return "any of torch's, over parameters()"

    def wheres(self, chunk: ChunkLayout) -> tuple[Where, ...]:
        return Where.DEVICE, Where.HOST

    def state_bytes(self, chunk: ChunkLayout) -> int:
        gradient_and_optimizer = chunk.master_bytes + chunk.shard_numel * self.optimizer_bytes
        return chunk.master_bytes + gradient_and_optimizer * chunk.trainable

    def device_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        copy = chunk.compute_bytes * self.keeps_copy(chunk, home)
        return copy + self.state_bytes(chunk) * home.on_device

    def host_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        return 0 if home.on_device else self.state_bytes(chunk) + chunk.shard_bytes * chunk.casts

    def held_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        return 0

    def passing_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        there = self.keeps_copy(chunk, home) or (home.on_device and not chunk.casts)
        return 0 if there else chunk.compute_bytes

    def stream_bytes(self, chunks: Placed) -> int:
        return 0

    waiting_bytes = stream_bytes

    def staging_bytes(self, chunks: Placed) -> int:
        landing = (chunk.compute_bytes for chunk, home in chunks if chunk.trainable and not home.on_device)
        return 2 * max(landing, default=0)

    @staticmethod
    def keeps_copy(chunk: ChunkLayout, home: Home) -> bool:
        """Whether the device keeps a copy of the weights, separate from the master."""
        return home.resident and (chunk.casts or not home.on_device)


@dataclass(frozen=True)
class OwnFormat(StateFormat):
    """State of our own optimizer, as `model.optimizer(...)` declares it: a master is the weight that computes and the
    remainder that it lacks; gradients keep the compute dtype until they are accumulated.

    Fields:
        moments: optimizer values per element (AdamW: 2) of parameters that are updated element by element.
        stored: how moments are stored.
        masters: how masters of trained parameters are stored.
        rules: name and rule of each parameter that is not updated element by element.
        in_backward: whether a chunk is updated as soon as its gradient is complete.
        accumulate: how many backwards make one step; if more than one, gradients are added in the master's dtype.
    """

    moments: int = 2
    in_backward: bool = False
    accumulate: int = 1
    stored: Moments = "exact"
    masters: Masters = "exact"
    rules: tuple[tuple[str, Rule], ...] = ()
    kind: ClassVar[str] = "own"
    beside: ClassVar[bool] = True

    def __str__(self) -> str:
        when = "in the backward" if self.in_backward else "from step() on"
        many = f", {self.accumulate} backwards each" if self.accumulate > 1 else ""
        how = f", moments as {self.stored}" if self._stores_moments and self.stored != "exact" else ""
        rounded = ", masters as bf16, rounded stochastically" if self.masters != "exact" else ""
        return f"the model's own, {when}{many}{how}{rounded}"

    @property
    def unit(self) -> int:
        return unit(stored_dtype(self.stored, torch.float32)) if self._stores_moments else 1

    @property
    def _stores_moments(self) -> bool:
        return self.moments > 0 or any(rule == "matrices" for _, rule in self.rules)

    # -- contents ------------------------------------------------------------------------------------------

    def rest_dtype(self, chunk: ChunkLayout) -> torch.dtype | None:
        """The dtype of what the master has beyond the weights: a 16-bit remainder if these are bfloat16, the whole
        master if they are float16; None if there is nothing, or nothing is kept."""
        if chunk.splits:
            return torch.int16 if self.masters == "exact" or not chunk.trainable else None
        return chunk.master_dtype if chunk.casts else None

    def moment_dtypes(self, chunk: ChunkLayout) -> tuple[torch.dtype, ...]:
        """The dtypes that the optimizer's values are stored in; none for a frozen chunk. Updates compute in the
        master's dtype, and round to these."""
        count = {"elements": self.moments, "matrices": 1, "factored": 0}[chunk.rule]
        return (stored_dtype(self.stored, chunk.master_dtype),) * (count * chunk.trainable)

    def factors_bytes(self, chunk: ChunkLayout) -> int:
        """Bytes of the factors of second moments, which stay on the device wherever the rest of the state is."""
        return chunk.factor_numel * chunk.master_dtype.itemsize

    def keeps_sum(self, chunk: ChunkLayout) -> bool:
        """Whether a sum of gradients in the master's dtype is kept at all times, rather than made when the user asks
        for one."""
        return chunk.trainable and self.accumulate > 1

    def lands(self, chunk: ChunkLayout, home: Home) -> bool:
        """Whether gradients land on the host."""
        return chunk.trainable and not home.on_device and not (home.streamed and self.at_once)

    def shares_landing(self, chunk: ChunkLayout, home: Home) -> bool:
        """Only gradients that are used on arrival, for an update or added to a sum, share landings."""
        is_used_up = self.in_backward or self.accumulate > 1
        return is_used_up and self.lands(chunk, home) and not home.lands_apart

    def state_bytes(self, chunk: ChunkLayout) -> int:
        total = chunk.master_bytes * self.keeps_sum(chunk)
        return chunk.shard_bytes + self._beside_weights_bytes(chunk) + self.factors_bytes(chunk) + total

    def _beside_weights_bytes(self, chunk: ChunkLayout, numel: int | None = None) -> int:
        """Bytes of moments and remainder, for the chunk's shard or for `numel` elements of it."""
        rest, numel = self.rest_dtype(chunk), chunk.shard_numel if numel is None else numel
        moments = sum(stored_bytes(dtype, numel) for dtype in self.moment_dtypes(chunk))
        return moments + (0 if rest is None else numel * rest.itemsize)

    # -- between steps -------------------------------------------------------------------------------------

    def wheres(self, chunk: ChunkLayout) -> tuple[Where, ...]:
        """Whole parameters are updated on the device only, as that takes products of matrices."""
        if not chunk.trainable:
            return Where.DEVICE, Where.HOST
        return (Where.DEVICE, Where.STREAMED) if chunk.is_whole else tuple(Where)

    def device_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        whole = chunk.compute_bytes * self.keeps_whole(chunk, home)
        if not home.on_device:
            return whole + self.factors_bytes(chunk)
        return self.state_bytes(chunk) + (whole - chunk.shard_bytes if whole else 0)  # the shard is part of the whole

    def host_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        if home.on_device:
            return 0
        landing = chunk.shard_bytes * (self.lands(chunk, home) and not self.shares_landing(chunk, home))
        spare = (chunk.shard_bytes + self._beside_weights_bytes(chunk)) * self.has_spare(chunk, home)
        there = chunk.shard_bytes * home.weights_on_device + self.factors_bytes(chunk)
        return self.state_bytes(chunk) - there + landing + spare

    def has_spare(self, chunk: ChunkLayout, home: Home) -> bool:
        """Only a trained state that the host updates, and not in the backward, has a spare. Not under float16, where no
        update begins before all gradients are known to be finite."""
        waits = self.in_backward or chunk.dtype == torch.float16
        return home.spare and home.where is Where.HOST and chunk.trainable and not waits

    def keeps_whole(self, chunk: ChunkLayout, home: Home) -> bool:
        """Whether the device keeps all of the weights, separate from this process's state or around its shard."""
        return home.resident and (not home.on_device or chunk.shards > 1)

    # -- in a step -----------------------------------------------------------------------------------------

    def held_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        holds = chunk.trainable and home.on_device and self.accumulate == 1 and not self.in_backward
        return chunk.shard_bytes * holds

    def passing_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        there = self.keeps_whole(chunk, home) or (home.on_device and chunk.shards == 1)
        return 0 if there else chunk.compute_bytes

    def stream_bytes(self, chunks: Placed) -> int:
        return sum(map(self._buffer_bytes, longest_of_each_kind(chunks)))

    def _buffer_bytes(self, chunk: ChunkLayout) -> int:
        """Bytes of the streaming buffers of one kind, whose longest streamed chunk is `chunk`."""
        itemsize = 0 if self.at_once else (chunk.master_dtype if self.accumulate > 1 else chunk.dtype).itemsize
        numel = chunk.piece_numel(STREAM_PIECE)
        gradient_bytes = itemsize * max(numel, SHORTEST_GRADIENT)
        state_bytes = numel * chunk.dtype.itemsize + self._beside_weights_bytes(chunk, numel)
        return STREAM_BUFFERS * (state_bytes + gradient_bytes)

    def waiting_bytes(self, chunks: Placed) -> int:
        """Gradients wait in programs' own buffers or, if sharded, as copies of shards, including the newest."""
        if not self.at_once:
            return 0
        return max((self._gradients_bytes(chunk) for chunk, home in chunks if home.streamed), default=0)

    @staticmethod
    def _gradients_bytes(chunk: ChunkLayout) -> int:
        count = STREAMED_GRADIENTS + (chunk.shards > 1)
        return count * chunk.shard_bytes  # the whole chunk if it is not sharded

    def staging_bytes(self, chunks: Placed) -> int:
        return sum(count * numel * dtype.itemsize for dtype, (count, numel) in self.landings(chunks).items())

    def landings(self, chunks: Placed) -> dict[torch.dtype, tuple[int, int]]:
        """By gradient dtype: how many landings chunks share, and the elements of each."""
        numels: dict[torch.dtype, list[int]] = {}
        for chunk, home in chunks:
            if self.shares_landing(chunk, home):
                numels.setdefault(chunk.dtype, []).append(chunk.shard_numel)
        return {dtype: (min(LANDINGS, len(found)), max(found)) for dtype, found in numels.items()}

    def working_bytes(self, chunks: Iterable[ChunkLayout]) -> int:
        """Twice the longest of each kind: a state that lies on the device may be updated beside a streamed one."""
        longest: dict[Kind, int] = {}
        for chunk in chunks:
            longest[kind_of(chunk)] = max(
                longest.get(kind_of(chunk), 0), whole_updates.working_bytes(chunk, self.masters)
            )
        return 2 * sum(longest.values())

    # -- transfers and updates -----------------------------------------------------------------------------

    def update_flop(self, chunk: ChunkLayout) -> float:
        return whole_updates.flop(chunk)

    def travelling_bytes(self, chunk: ChunkLayout, home: Home) -> tuple[int, int]:
        state = self._beside_weights_bytes(chunk) + (0 if home.resident else chunk.shard_bytes)
        gradient = chunk.master_bytes if self.accumulate > 1 else chunk.shard_bytes
        return state + (0 if self.at_once else gradient), state

    def update_share(self, chunk: ChunkLayout) -> float:
        gradient = chunk.master_bytes if self.accumulate > 1 else chunk.shard_bytes
        moved = 2 * (chunk.shard_bytes + self._beside_weights_bytes(chunk)) + gradient
        return moved / max(chunk.shard_numel * update_bytes(self.stored), 1)


def kinds_of_format() -> dict[str, type[StateFormat]]:
    """All defined formats, by kind."""
    found, known = {}, [StateFormat]
    for parent in known:
        for child in parent.__subclasses__():
            found[child.kind] = child
            known.append(child)
    return found


def kind_of(chunk: ChunkLayout) -> Kind:
    """The kind of a chunk; streamed chunks of one kind share buffers."""
    return chunk.dtype, chunk.master_dtype, chunk.rule


def longest_of_each_kind(chunks: Placed) -> list[ChunkLayout]:
    """For each kind of streamed chunk, the one with the longest pieces."""
    kinds: dict[Kind, ChunkLayout] = {}
    for chunk, home in chunks:
        if home.streamed:
            longest = kinds.setdefault(kind_of(chunk), chunk)
            kinds[kind_of(chunk)] = max(
                longest, chunk, key=lambda one: (one.piece_numel(STREAM_PIECE), one.shard_numel)
            )
    return list(kinds.values())
