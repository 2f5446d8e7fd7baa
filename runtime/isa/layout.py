"""Where every parameter lives: plain layout dataclasses shared by plans, passes and the machine."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

STREAM_PIECE = 16 * 2**20
"""Elements of a streamed training state that move at a time: few enough for little memory, enough for few launches."""

STREAM_BUFFERS = 3
"""Pieces on the device at a time: one comes up, one is updated, one goes down."""

STREAMED_GRADIENTS = 2
"""Gradients of streamed chunks that may wait on the device for their update at a time."""

ALIGNMENT_BYTES = 256
"""Every slot starts on this boundary, so that vector loads and tensor cores see aligned weights."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a chunk: `offset` and `numel` count elements of the chunk's dtype.

    `shape` is of this process's part; `placement` tells how the parameter lies on the mesh, such as "row=S1 col=S0"
    ("": every process has all of it).
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    placement: str = ""

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ChunkLayout:
    """A contiguous 1-D buffer of parameters that share dtypes, trainability and axes, in order of first use.

    `dtype` is what the program computes with, `master_dtype` what the optimizer updates. Along the mesh's axes
    `reduced_over`, in their order there, processes have the same weights, and gradients are summed. Of the training
    state each of `shards` of those processes keeps one of as many stretches of equal length, its shard.
    """

    index: int
    numel: int
    dtype: torch.dtype
    master_dtype: torch.dtype
    trainable: bool
    slots: tuple[Slot, ...]
    shards: int = 1
    reduced_over: tuple[str, ...] = ()

    @property
    def shard_numel(self) -> int:
        return self.numel // self.shards

    @property
    def compute_bytes(self) -> int:
        """What programs compute with: all of it."""
        return self.numel * self.dtype.itemsize

    @property
    def shard_bytes(self) -> int:
        """One shard in the compute dtype."""
        return self.shard_numel * self.dtype.itemsize

    @property
    def master_bytes(self) -> int:
        """One shard in the master's dtype."""
        return self.shard_numel * self.master_dtype.itemsize

    @property
    def casts(self) -> bool:
        """Whether computing needs a copy in another dtype than the master's."""
        return self.dtype != self.master_dtype

    @property
    def splits(self) -> bool:
        """Whether the master can be kept exactly as the weight that computes and a 16-bit remainder."""
        return self.dtype == torch.bfloat16 and self.master_dtype == torch.float32

    def held(self, slot: int, number: int) -> slice:
        """Which elements of a parameter, counted flat, lie in shard `number`; an empty slice where none do."""
        place, begin = self.slots[slot], number * self.shard_numel
        start, stop = (min(max(at - place.offset, 0), place.numel) for at in (begin, begin + self.shard_numel))
        return slice(start, stop)

    def shard(self, number: int) -> "ChunkLayout":
        """One shard as a chunk of its own, in whose slots, flat, is what it has of each parameter."""
        if self.shards == 1:
            return self
        begin, slots = number * self.shard_numel, []
        for i, slot in enumerate(self.slots):
            held = self.held(i, number)
            offset = min(max(slot.offset + held.start - begin, 0), self.shard_numel)
            slots.append(replace(slot, offset=offset, shape=(held.stop - held.start,)))
        return replace(self, numel=self.shard_numel, slots=tuple(slots), shards=1)


@dataclass(frozen=True)
class Layout:
    """All chunks of a model. `tied` maps each further name of a shared parameter to its first name."""

    chunks: tuple[ChunkLayout, ...]
    tied: tuple[tuple[str, str], ...] = ()

    @cached_property
    def places(self) -> dict[str, tuple[ChunkLayout, int]]:
        """Parameter name -> (its chunk, its slot's number)."""
        return {slot.name: (chunk, i) for chunk in self.chunks for i, slot in enumerate(chunk.slots)}


def longest_of_each_kind(chunks: Iterable[ChunkLayout]) -> list[ChunkLayout]:
    """Of chunks that are streamed the longest of each pair of dtypes: those that share dtypes share buffers."""
    kinds: dict[tuple[torch.dtype, torch.dtype], ChunkLayout] = {}
    for chunk in chunks:
        longest = kinds.setdefault((chunk.dtype, chunk.master_dtype), chunk)
        kinds[chunk.dtype, chunk.master_dtype] = max(longest, chunk, key=lambda layout: layout.shard_numel)
    return list(kinds.values())


@dataclass(frozen=True)
class TorchUpdates:
    """Masters are tensors that any element-wise torch optimizer updates, its state (`state_bytes` per element)
    and gradients in the master's dtype beside them."""

    state_bytes: int = 8

    def device_bytes(self, chunk: ChunkLayout) -> int:
        """What a chunk's whole training state takes on the device."""
        gradient_and_state = chunk.master_bytes + chunk.shard_numel * self.state_bytes
        return chunk.master_bytes + (gradient_and_state if chunk.trainable else 0)

    def host_bytes(self, chunk: ChunkLayout, streamed: bool = False) -> int:
        """What it takes on the host, the copy that streams in another dtype included."""
        return self.device_bytes(chunk) + (chunk.shard_bytes if chunk.casts else 0)


@dataclass(frozen=True)
class Updates:
    """Our own optimizer, as `model.optimizer(...)` declared it: masters are the weights that compute and what
    they lack, and gradients keep the compute dtype until they are accumulated. Of a chunk that is divided into
    shards one process's is counted.

    Fields:
        moments: values of optimizer state per element, in the master's dtype (AdamW: 2).
        in_backward: whether a chunk is updated as soon as its gradient is complete.
        accumulate: how many backwards make one step; more than one adds in the master's dtype.
    """

    moments: int = 2
    in_backward: bool = False
    accumulate: int = 1

    @property
    def at_once(self) -> bool:
        """Whether a complete gradient is used where it is, without being held or added to others."""
        return self.in_backward and self.accumulate == 1

    def stream_bytes(self, chunk: ChunkLayout) -> int:
        """Device bytes of the pieces that are on their way where `chunk` is the longest that is streamed."""
        gradient = 0 if self.at_once else chunk.dtype.itemsize if self.accumulate == 1 else chunk.master_dtype.itemsize
        state = (self.master_bytes(chunk) + self.moment_bytes(chunk)) // max(chunk.shard_numel, 1)
        return STREAM_BUFFERS * min(STREAM_PIECE, chunk.shard_numel) * (state + gradient)

    def master_bytes(self, chunk: ChunkLayout) -> int:
        """The weights that compute and the rest of their masters: 4 bytes in all for a bfloat16 weight."""
        rest = chunk.shard_numel * 2 if chunk.splits else chunk.master_bytes if chunk.casts else 0
        return chunk.shard_bytes + rest

    def moment_bytes(self, chunk: ChunkLayout) -> int:
        return self.moments * chunk.master_bytes if chunk.trainable else 0

    def keeps_sum(self, chunk: ChunkLayout) -> bool:
        """Whether a sum of gradients is always there, and not only made where somebody asks for one."""
        return chunk.trainable and self.accumulate > 1

    def holds_gradient(self, chunk: ChunkLayout) -> bool:
        """Whether a state on the device keeps the gradient that a program made, until the step is over."""
        return chunk.trainable and self.accumulate == 1 and not self.in_backward

    def lands_gradient(self, chunk: ChunkLayout, streamed: bool) -> bool:
        """Whether gradients come to the host, to a state there that is `streamed` or not."""
        return chunk.trainable and not (streamed and self.at_once)

    def device_bytes(self, chunk: ChunkLayout) -> int:
        """What a chunk's whole training state takes on the device, a gradient held between steps included."""
        held = self.holds_gradient(chunk) * chunk.shard_bytes + self.keeps_sum(chunk) * chunk.master_bytes
        return self.master_bytes(chunk) + self.moment_bytes(chunk) + held

    def host_bytes(self, chunk: ChunkLayout, streamed: bool = False) -> int:
        """What it takes on the host, the buffer that gradients land in included."""
        landed = self.lands_gradient(chunk, streamed) * chunk.shard_bytes + self.keeps_sum(chunk) * chunk.master_bytes
        return self.master_bytes(chunk) + self.moment_bytes(chunk) + landed
