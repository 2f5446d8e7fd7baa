"""Where every parameter lives: plain layout dataclasses shared by plans, passes and the machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from math import prod
from typing import Literal

import torch
from torch import Tensor

ALIGNMENT_BYTES = 256
"""Every slot starts on this boundary, so that vector loads and tensor cores see aligned weights."""


LONGEST_UNIT = 256
"""The largest alignment of slots, in elements; see `alignment`."""

Rule = Literal["elements", "matrices", "factored"]
"""How an optimizer updates a parameter: "elements" element by element; "matrices" as a whole matrix, with a moment per
element; "factored" as a whole, with second moments kept as factors, one value per row and one per column."""


def alignment(dtype: torch.dtype, unit: int = 1) -> int:
    """The alignment of slots and shards, in elements of `dtype`, if `unit` elements are updated together."""
    return max(ALIGNMENT_BYTES // dtype.itemsize, unit)


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides as torch computes them: a dimension of size 0 counts as 1."""
    return _contiguous_stride(tuple(shape))


@cache
def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def parameter_view(flat: Tensor, offset: int, shape: Sequence[int]) -> Tensor:
    """One parameter's view of a flat chunk; `offset` counts elements."""
    return flat.narrow(0, offset, prod(shape)).view(shape)


def verified_view(flat: Tensor, offset: int, shape: Sequence[int]) -> Tensor:
    """The same as `parameter_view`, for places that were checked when the program was made, in one operator instead of
    two: programs take hundreds of views a step, and small batches wait for the thread that launches them."""
    return flat.as_strided(shape, contiguous_stride(shape), flat.storage_offset() + offset)


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a chunk: `offset` and `numel` count elements of the chunk's dtype.

    `shape` is that of this process's shard; `placement` is how the parameter lies on the mesh, such as "row=S1 col=S0"
    ("" if every process has all of it).
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    placement: str = ""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """The view of this slot in `flat`, a buffer as long as the chunk."""
        return parameter_view(flat, self.offset, self.shape)

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the factors of its second moments, over the last two dimensions; a vector's moments are kept in
        full."""
        if len(self.shape) < 2:
            return (self.shape,)
        *first, rows, columns = self.shape
        return (*first, rows, 1), (*first, 1, columns)


@dataclass(frozen=True)
class ChunkLayout:
    """A contiguous 1-D buffer of parameters that share dtypes, trainability, reduction axes and update rule, in order
    of first use.

    `dtype` is what programs compute in, `master_dtype` what the optimizer updates. Processes along the mesh axes
    `reduced_over`, in mesh order, have the same weights, and gradients are summed over them. If `shards` is above 1,
    that many processes each keep one shard of the training state: equal ranges of the chunk.
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
        """Names the chunk in memory bookings and messages."""
        return f"chunk {self.index}"

    @property
    def shard_numel(self) -> int:
        return self.numel // self.shards

    @property
    def compute_bytes(self) -> int:
        """Bytes of the whole chunk in the compute dtype."""
        return self.numel * self.dtype.itemsize

    @property
    def shard_bytes(self) -> int:
        """Bytes of one shard in the compute dtype."""
        return self.shard_numel * self.dtype.itemsize

    @property
    def master_bytes(self) -> int:
        """Bytes of one shard in the master's dtype."""
        return self.shard_numel * self.master_dtype.itemsize

    @property
    def casts(self) -> bool:
        """Whether computing needs a copy in a dtype other than the master's."""
        return self.dtype != self.master_dtype

    @property
    def splits(self) -> bool:
        """Whether the master can be kept exactly as the bfloat16 weight and a 16-bit remainder."""
        return self.dtype == torch.bfloat16 and self.master_dtype == torch.float32

    @property
    def is_whole(self) -> bool:
        """Whether parameters are updated as a whole, never a part of one alone."""
        return self.trainable and self.rule != "elements"

    @property
    def longest_numel(self) -> int:
        """Elements of the longest parameter, rounded up to where another parameter may start."""
        longest = max((slot.numel for slot in self.slots), default=0)
        return min(-(-longest // LONGEST_UNIT) * LONGEST_UNIT, self.numel)

    def piece_numel(self, most: int) -> int:
        """How many elements of its state are updated at a time: at most `most`, or the longest parameter if updates are
        whole."""
        return self.longest_numel if self.is_whole else min(most, self.shard_numel)

    @cached_property
    def in_order(self) -> tuple[tuple[int, Slot], ...]:
        """The slots with their indices, as they lie in the chunk, empty ones first."""
        return tuple(sorted(enumerate(self.slots), key=lambda item: (item[1].offset, item[1].numel)))

    @cached_property
    def factors(self) -> tuple[tuple[Slot, ...], ...]:
        """By slot, the places of the factors of its second moments, which all lie in one vector."""
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
        """Elements of all factors together; 0 if the chunk is not updated by factors."""
        if self.rule != "factored" or not self.trainable:
            return 0
        return sum(place.numel for places in self.factors for place in places)

    def held(self, slot: int, number: int) -> slice:
        """The elements of a parameter, counted flat, that lie in shard `number`; an empty slice if none do."""
        place, begin = self.slots[slot], number * self.shard_numel
        start, stop = (min(max(at - place.offset, 0), place.numel) for at in (begin, begin + self.shard_numel))
        return slice(start, stop)

    def shard(self, number: int) -> "ChunkLayout":
        """One shard as a chunk of its own, whose flat slots are what the shard holds of each parameter."""
        if self.shards == 1:
            return self
        begin, slots = number * self.shard_numel, []
        for i, slot in enumerate(self.slots):
            held = self.held(i, number)
            offset = min(max(slot.offset + held.start - begin, 0), self.shard_numel)
            slots.append(replace(slot, offset=offset, shape=(held.stop - held.start,)))
        return replace(self, numel=self.shard_numel, slots=tuple(slots), shards=1)


Owners = tuple[int, ...]
"""The pipeline ranks whose layers read a parameter, and which therefore have it. If there are several, as for tied
embeddings, each of them makes the same update."""


@dataclass(frozen=True)
class Layout:
    """All chunks that a process has of a model. `tied` maps each further name of a shared parameter to its first name.

    `owned` lists all parameters of a pipelined model with their owners, in the model's order: the same on every
    process, whereas `chunks` hold only the process's own parameters. Without a pipeline it is empty, and every process
    has all.
    """

    chunks: tuple[ChunkLayout, ...]
    tied: tuple[tuple[str, str], ...] = ()
    owned: tuple[tuple[str, Owners], ...] = ()

    @cached_property
    def owners(self) -> dict[str, Owners]:
        """Parameter name -> the pipeline ranks that have it; empty without a pipeline."""
        return dict(self.owned)

    @cached_property
    def places(self) -> dict[str, tuple[ChunkLayout, int]]:
        """Parameter name -> (its chunk, its slot's index)."""
        return {slot.name: (chunk, i) for chunk in self.chunks for i, slot in enumerate(chunk.slots)}

    def follows(self, rules: Mapping[str, Rule]) -> bool:
        """Whether every trainable chunk has the rule that `rules` give each of its parameters, "elements" where they
        give none."""
        trained = (chunk for chunk in self.chunks if chunk.trainable)
        return all(chunk.rule == rules.get(slot.name, "elements") for chunk in trained for slot in chunk.slots)

    def is_cut_for(self, unit: int) -> bool:
        """Whether `unit` elements may be updated together: shards and slots start at multiples of `unit`."""
        starts = (chunk.shard_numel for chunk in self.chunks), (s.offset for c in self.chunks for s in c.slots)
        return not any(start % unit for start in chain(*starts))
