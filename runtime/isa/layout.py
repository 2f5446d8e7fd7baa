"""Where every parameter lives: plain layout dataclasses shared by plans, passes and the machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import prod
from typing import Literal

import torch
from torch import Tensor

ALIGNMENT_BYTES = 256
"""Every slot starts on this boundary, so that vector loads and tensor cores see aligned weights."""


LONGEST_UNIT = 256
"""Of how many elements at most the beginnings of slots are multiples."""

Rule = Literal["elements", "matrices", "factored"]
"""How an optimizer updates parameters: element by element; whole matrices, each element with a moment; or whole
parameters, of whose second moments factors are kept, one for each row and one for each column."""


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

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the factors of its second moments, which are of the last two dimensions; a vector's are all kept."""
        if len(self.shape) < 2:
            return (self.shape,)
        *first, rows, columns = self.shape
        return (*first, rows, 1), (*first, 1, columns)


@dataclass(frozen=True)
class ChunkLayout:
    """A contiguous 1-D buffer of parameters that share dtypes, trainability, axes and the rule that they are updated
    by, in order of first use.

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
    rule: Rule = "elements"

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

    @property
    def is_whole(self) -> bool:
        """Whether parameters are updated as wholes: no part of one alone."""
        return self.trainable and self.rule != "elements"

    @property
    def longest_numel(self) -> int:
        """The longest of its parameters, and what lies behind it up to where another may begin."""
        longest = max((slot.numel for slot in self.slots), default=0)
        return min(-(-longest // LONGEST_UNIT) * LONGEST_UNIT, self.numel)

    def piece_numel(self, most: int) -> int:
        """How many elements of its state are updated at a time, `most` of them unless parameters are longer wholes."""
        return self.longest_numel if self.is_whole else min(most, self.shard_numel)

    @cached_property
    def factors(self) -> tuple[tuple[Slot, ...], ...]:
        """By slot the places of the factors of its second moments, which all lie in one vector."""
        found, offset = [], 0
        for slot in self.slots:
            places = []
            for shape in slot.factor_shapes:
                places.append(Slot(slot.name, offset, shape))
                offset += prod(shape)
            found.append(tuple(places))
        return tuple(found)

    @property
    def factor_numel(self) -> int:
        """All factors together, of what is updated by them; 0 of what has none."""
        if self.rule != "factored" or not self.trainable:
            return 0
        return sum(place.numel for places in self.factors for place in places)

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

    def follows(self, rules: Mapping[str, Rule]) -> bool:
        """Whether chunks hold what is updated by the same of these rules, and by no other than they say."""
        trained = (chunk for chunk in self.chunks if chunk.trainable)
        return all(chunk.rule == rules.get(slot.name, "elements") for chunk in trained for slot in chunk.slots)

    def is_cut_for(self, unit: int) -> bool:
        """Whether `unit` elements may be updated together: whether chunks, shards and slots consist of whole units."""
        starts = (chunk.shard_numel for chunk in self.chunks), (s.offset for c in self.chunks for s in c.slots)
        return not any(start % unit for start in chain(*starts))
