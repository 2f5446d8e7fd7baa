"""StateFormat: what a chunk's training state consists of, and how many bytes that takes, where and on the way.

There is one format for masters that any of torch's optimizers updates, and one of our own, whose moments are stored in
one of several ways (`moments`). Planner, clock, stores and reports ask the format, and derive nothing themselves. Of a
chunk that is divided into shards one process's is counted.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from . import whole_updates
from .homes import Home, Where
from .layout import ChunkLayout, Rule
from .moments import BLOCK, Masters, Moments, stored_bytes, stored_dtype, unit, update_bytes

STREAM_PIECE = 16 * 2**20
"""Elements of a streamed training state that move at a time: few enough for little memory, enough for few launches."""

SHORTEST_GRADIENT = 2 * BLOCK
"""Elements of a streamed gradient that have room at least: a sum of a block fits then, in twice as many bytes."""

STREAM_BUFFERS = 3
"""Pieces on the device at a time: one comes up, one is updated, one goes down."""

STREAMED_GRADIENTS = 2
"""Gradients of streamed chunks that may wait on the device for their update at a time."""

LANDINGS = 3
"""Places on the host that gradients which are used up there take turns in: one comes, one waits, one is read."""

Kind = tuple[torch.dtype, torch.dtype, Rule]
"""Of chunks whose states consist of the same: what weights compute in, masters are, and the rule of updates."""

Placed = Iterable[tuple[ChunkLayout, Home]]
"""Chunks, and where each of them is."""


class StateFormat(ABC):
    """What a chunk's training state consists of. Formats are frozen dataclasses, and a plan's JSON has their fields
    and their `kind`.

    `beside` tells whether updates run beside programs, chunk by chunk, and leave new weights wherever these are read;
    else they are all made in the optimizer's `step()`, and programs copy from the masters themselves.
    """

    kind: ClassVar[str]
    beside: ClassVar[bool]
    in_backward: bool = False
    accumulate: int = 1
    stored: Moments = "exact"

    @property
    def at_once(self) -> bool:
        """Whether a complete gradient is used where it is, without being held or added to others."""
        return self.in_backward and self.accumulate == 1

    @property
    def unit(self) -> int:
        """How many elements are updated together: slots and shards begin at multiples of it."""
        return 1

    # -- for good ------------------------------------------------------------------------------------------

    @abstractmethod
    def wheres(self, chunk: ChunkLayout) -> tuple[Where, ...]:
        """Where a chunk's training state may lie."""

    @abstractmethod
    def state_bytes(self, chunk: ChunkLayout) -> int:
        """A chunk's whole training state where it is all in one place, without what moves need."""

    @abstractmethod
    def device_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        """What a chunk takes on the device between steps: its state, or the weights of it that stay."""

    def has_spare(self, chunk: ChunkLayout, home: Home) -> bool:
        """Whether there is a second place for the state, where the next update is made before `step()`."""
        return False

    @abstractmethod
    def host_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        """What it takes on the host, the buffers that copies start from and gradients land in included."""

    # -- in a step -----------------------------------------------------------------------------------------

    def shares_landing(self, chunk: ChunkLayout, home: Home) -> bool:
        """Whether gradients come to the host in one of the few places that chunks take turns in."""
        return False

    @abstractmethod
    def held_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        """A gradient that stays on the device, as a program made it, until its step is over."""

    @abstractmethod
    def passing_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        """What the weights take on the device only while a program reads them; 0 where they are there for good."""

    @abstractmethod
    def stream_bytes(self, chunks: Placed) -> int:
        """Buffers on the device for the states among `chunks` that travel through it."""

    @abstractmethod
    def waiting_bytes(self, chunks: Placed) -> int:
        """Gradients on the device that wait there for states on their way."""

    @abstractmethod
    def staging_bytes(self, chunks: Placed) -> int:
        """Host memory that all chunks share, for gradients to land in."""

    def working_bytes(self, chunks: Iterable[ChunkLayout]) -> int:
        """What updates of whole parameters take on the device while they run."""
        return 0

    # -- on the way ----------------------------------------------------------------------------------------

    def travelling_bytes(self, chunk: ChunkLayout, home: Home) -> tuple[int, int]:
        """What a streamed state moves for one update, to the device and back."""
        return 0, 0

    def update_share(self, chunk: ChunkLayout) -> float:
        """The bytes that an update moves, of those of one by AdamW whose moments are stored in the same way."""
        return 1.0

    def update_flop(self, chunk: ChunkLayout) -> float:
        """What an update computes beside passing over its state once."""
        return 0.0

    def travelling_share(self, chunk: ChunkLayout, home: Home) -> float:
        """The bytes that a streamed state moves, of those with exact moments."""
        return 1.0


@dataclass(frozen=True)
class TorchFormat(StateFormat):
    """Masters are tensors that any element-wise torch optimizer updates, gradients in the master's dtype beside them,
    and the optimizer's state: `optimizer_bytes` per element (AdamW: 8)."""

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
        """Whether the device keeps a copy of the weights, apart from the master."""
        return home.resident and (chunk.casts or not home.on_device)


@dataclass(frozen=True)
class OwnFormat(StateFormat):
    """Our own optimizer's, as `model.optimizer(...)` declared it: masters are the weights that compute and what these
    lack of them, and gradients keep the compute dtype until they are accumulated.

    Fields:
        moments: values of optimizer state per element (AdamW: 2), of what is updated element by element.
        stored: how these are stored.
        masters: how masters are, of what is trained.
        rules: of the parameters that are not updated element by element, by name.
        in_backward: whether a chunk is updated as soon as its gradient is complete.
        accumulate: how many backwards make one step; more than one adds in the master's dtype.
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

    # -- of what it consists -------------------------------------------------------------------------------

    def rest_dtype(self, chunk: ChunkLayout) -> torch.dtype | None:
        """The dtype of what the weights lack of their masters: a 16-bit remainder where they are bfloat16, the whole
        master where they are float16; None where they lack nothing, or nothing that is kept."""
        if chunk.splits:
            return torch.int16 if self.masters == "exact" or not chunk.trainable else None
        return chunk.master_dtype if chunk.casts else None

    def moment_dtypes(self, chunk: ChunkLayout) -> tuple[torch.dtype, ...]:
        """The dtypes that the optimizer's values are stored in; none for what is not trained. Updates compute in the
        master's dtype, and round to these where they are others."""
        count = {"elements": self.moments, "matrices": 1, "factored": 0}[chunk.rule]
        return (stored_dtype(self.stored, chunk.master_dtype),) * (count * chunk.trainable)

    def factors_bytes(self, chunk: ChunkLayout) -> int:
        """Factors of second moments, which are on the device wherever the rest of the state is."""
        return chunk.factor_numel * chunk.master_dtype.itemsize

    def keeps_sum(self, chunk: ChunkLayout) -> bool:
        """Whether a sum of gradients, in the master's dtype, is always there, and not only made where somebody asks
        for one."""
        return chunk.trainable and self.accumulate > 1

    def lands(self, chunk: ChunkLayout, home: Home) -> bool:
        """Whether gradients come to the host."""
        return chunk.trainable and not home.on_device and not (home.streamed and self.at_once)

    def shares_landing(self, chunk: ChunkLayout, home: Home) -> bool:
        """Of what is updated with, or added to a sum, as soon as it has landed."""
        is_used_up = self.in_backward or self.accumulate > 1
        return is_used_up and self.lands(chunk, home) and not home.lands_apart

    def state_bytes(self, chunk: ChunkLayout) -> int:
        total = chunk.master_bytes * self.keeps_sum(chunk)
        return chunk.shard_bytes + self._beside_weights_bytes(chunk) + self.factors_bytes(chunk) + total

    def _beside_weights_bytes(self, chunk: ChunkLayout, numel: int | None = None) -> int:
        """Of the chunk's shard, or of so many elements of it."""
        rest, numel = self.rest_dtype(chunk), chunk.shard_numel if numel is None else numel
        moments = sum(stored_bytes(dtype, numel) for dtype in self.moment_dtypes(chunk))
        return moments + (0 if rest is None else numel * rest.itemsize)

    # -- for good ------------------------------------------------------------------------------------------

    def wheres(self, chunk: ChunkLayout) -> tuple[Where, ...]:
        """Whole parameters are updated on the device, which multiplies matrices."""
        if not chunk.trainable:
            return Where.DEVICE, Where.HOST
        return (Where.DEVICE, Where.STREAMED) if chunk.is_whole else tuple(Where)

    def device_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        whole = chunk.compute_bytes * self.keeps_whole(chunk, home)
        if not home.on_device:
            return whole + self.factors_bytes(chunk)
        return self.state_bytes(chunk) + (whole - chunk.shard_bytes if whole else 0)  # the shard is a part of the whole

    def host_bytes(self, chunk: ChunkLayout, home: Home) -> int:
        if home.on_device:
            return 0
        landing = chunk.shard_bytes * (self.lands(chunk, home) and not self.shares_landing(chunk, home))
        spare = (chunk.shard_bytes + self._beside_weights_bytes(chunk)) * self.has_spare(chunk, home)
        there = chunk.shard_bytes * home.weights_on_device + self.factors_bytes(chunk)
        return self.state_bytes(chunk) - there + landing + spare

    def has_spare(self, chunk: ChunkLayout, home: Home) -> bool:
        """Of what the host updates when `step()` has said so."""
        return home.spare and home.where is Where.HOST and chunk.trainable and not self.in_backward

    def keeps_whole(self, chunk: ChunkLayout, home: Home) -> bool:
        """Whether the device keeps all of the weights, apart from, or around, those of this process's state."""
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
        """The pieces on their way where `chunk` is the longest that travels."""
        itemsize = 0 if self.at_once else (chunk.master_dtype if self.accumulate > 1 else chunk.dtype).itemsize
        numel = chunk.piece_numel(STREAM_PIECE)
        gradient_bytes = itemsize * max(numel, SHORTEST_GRADIENT)
        state_bytes = numel * chunk.dtype.itemsize + self._beside_weights_bytes(chunk, numel)
        return STREAM_BUFFERS * (state_bytes + gradient_bytes)

    def waiting_bytes(self, chunks: Placed) -> int:
        """Programs' own buffers, or copies of shards, of the newest too."""
        if not self.at_once:
            return 0
        return max((self._gradients_bytes(chunk) for chunk, home in chunks if home.streamed), default=0)

    @staticmethod
    def _gradients_bytes(chunk: ChunkLayout) -> int:
        count = STREAMED_GRADIENTS + (chunk.shards > 1)
        return count * chunk.shard_bytes  # all of a chunk that is not divided

    def staging_bytes(self, chunks: Placed) -> int:
        return sum(count * numel * dtype.itemsize for dtype, (count, numel) in self.landings(chunks).items())

    def landings(self, chunks: Placed) -> dict[torch.dtype, tuple[int, int]]:
        """By dtype of gradients how many places chunks take turns in, and of how many elements."""
        numels: dict[torch.dtype, list[int]] = {}
        for chunk, home in chunks:
            if self.shares_landing(chunk, home):
                numels.setdefault(chunk.dtype, []).append(chunk.shard_numel)
        return {dtype: (min(LANDINGS, len(found)), max(found)) for dtype, found in numels.items()}

    def working_bytes(self, chunks: Iterable[ChunkLayout]) -> int:
        """The longest of each kind, twice: beside a state on its way one may be updated that lies on the device."""
        longest: dict[Kind, int] = {}
        for chunk in chunks:
            longest[kind_of(chunk)] = max(longest.get(kind_of(chunk), 0), whole_updates.working_bytes(chunk))
        return 2 * sum(longest.values())

    # -- on the way ----------------------------------------------------------------------------------------

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

    def travelling_share(self, chunk: ChunkLayout, home: Home) -> float:
        moved, exact = (sum(format.travelling_bytes(chunk, home)) for format in (self, replace(self, stored="exact")))
        return moved / max(exact, 1)


def kinds_of_format() -> dict[str, type[StateFormat]]:
    """All formats that are defined, by kind."""
    found, known = {}, [StateFormat]
    for parent in known:
        for child in parent.__subclasses__():
            found[child.kind] = child
            known.append(child)
    return found


def kind_of(chunk: ChunkLayout) -> Kind:
    """Those of one kind that are streamed share buffers."""
    return chunk.dtype, chunk.master_dtype, chunk.rule


def longest_of_each_kind(chunks: Placed) -> list[ChunkLayout]:
    """Of the chunks that are streamed that of each kind whose pieces are longest."""
    kinds: dict[Kind, ChunkLayout] = {}
    for chunk, home in chunks:
        if home.streamed:
            longest = kinds.setdefault(kind_of(chunk), chunk)
            kinds[kind_of(chunk)] = max(
                longest, chunk, key=lambda one: (one.piece_numel(STREAM_PIECE), one.shard_numel)
            )
    return list(kinds.values())
