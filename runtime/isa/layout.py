"""Where every parameter lives: plain layout dataclasses shared by plans, passes and the machine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import prod

import torch
from torch import Tensor

ALIGNMENT_BYTES = 256
"""Every slot starts on this boundary, so that vector loads and tensor cores see aligned weights."""


def alignment(dtype: torch.dtype, unit: int = 1) -> int:
    """Of how many elements of a dtype the beginnings of slots and shards are multiples, where `unit` elements are
    updated together."""
    return max(ALIGNMENT_BYTES // dtype.itemsize, unit)


def parameter_view(flat: Tensor, offset: int, shape: Sequence[int]) -> Tensor:
    """One parameter of a flat chunk; `offset` counts elements."""
    return flat.narrow(0, offset, prod(shape)).view(shape)


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

    def of(self, flat: Tensor) -> Tensor:
        """What lies here of a chunk, or of what is as long as a chunk."""
        return parameter_view(flat, self.offset, self.shape)


@dataclass(frozen=True)
class ChunkLayout:
    """A contiguous 1-D buffer of parameters that share dtypes, trainability and axes, in order of first use.

    `dtype` is what the program computes with, `master_dtype` what the optimizer updates. Along the mesh's axes
    `reduced_over`, in their order there, processes have the same weights, and gradients are summed. Of the training
    state each of `shards` of those processes keeps one of as many ranges of equal length, its shard.
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
    def name(self) -> str:
        """For accounts and messages."""
        return f"chunk {self.index}"

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


Owners = tuple[int, ...]
"""Who along a pipeline has a parameter: the processes, counted along the pipeline's axis, whose layers read it. A
parameter that several have, as tied embeddings are, is updated alike by each of them."""


@dataclass(frozen=True)
class Layout:
    """All chunks that a process has of a model. `tied` maps each further name of a shared parameter to its first name.

    `owned` tells of all parameters of a model that runs as a pipeline, in the model's order, who has them: alike on
    every process, where chunks are of its own parameters alone. Without pipeline it is empty, and everybody has all.
    """

    chunks: tuple[ChunkLayout, ...]
    tied: tuple[tuple[str, str], ...] = ()
    owned: tuple[tuple[str, Owners], ...] = ()

    @cached_property
    def owners(self) -> dict[str, Owners]:
        """Parameter name -> who along the pipeline has it; empty without pipeline."""
        return dict(self.owned)

    @cached_property
    def places(self) -> dict[str, tuple[ChunkLayout, int]]:
        """Parameter name -> (its chunk, its slot's number)."""
        return {slot.name: (chunk, i) for chunk in self.chunks for i, slot in enumerate(chunk.slots)}

    def is_cut_for(self, unit: int) -> bool:
        """Whether `unit` elements may be updated together: whether chunks, shards and slots consist of whole units."""
        starts = (chunk.shard_numel for chunk in self.chunks), (s.offset for c in self.chunks for s in c.slots)
        return not any(start % unit for start in chain(*starts))
