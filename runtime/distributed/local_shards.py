"""A process's shards of parameters that are placed on the mesh: from the whole to the shard and back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor
from torch import distributed as dist

from ..isa.layout import Slot
from ..isa.mesh import Axis, Placements, Shard, join_shards, local_shard, parse_placements, take_shard, whole_shape
from .collectives import all_gather_single
from .ranks import Ranks

PIECE = 4 * 2**20
"""Elements of a shard that are gathered at a time, to keep the device memory that this takes beside the model small."""


@dataclass(frozen=True)
class Region:
    """A rectangle of a whole tensor (`offsets`, `sizes`), and where a process has it: `start` and `strides` count
    elements of a flat tensor, such as a chunk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    strides: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The view of this region in `flat`."""
        return flat.as_strided(self.sizes, self.strides, flat.storage_offset() + self.start)


@dataclass(frozen=True)
class LocalShards:
    """Cuts parameters into the shards of the processes of `ranks`, and joins shards."""

    ranks: Ranks

    def placements(self, slot: Slot) -> Placements:
        return parse_placements(slot.placement, self._axes)

    def whole_shape(self, slot: Slot) -> tuple[int, ...]:
        """The shape of the whole parameter that the slot has a shard of."""
        return whole_shape(slot.shape, self.placements(slot), self._axes)

    def elsewhere(self, slot: Slot) -> str:
        """Message text if other ranks have other parts of the parameter; "" if this process has all of it."""
        placed = zip(self.placements(slot), self._axes, strict=True)
        cut = self.ranks.together and any(isinstance(p, Shard) and axis.size > 1 for p, axis in placed)
        return f"{slot.name} is sharded: other ranks hold other parts of it" if cut else ""

    def replicas(self, slot: Slot) -> int:
        """How many processes have the same shard, along the axes that weights are sharded over."""
        placed = dict(zip(self._axes, self.placements(slot), strict=True))
        return prod(axis.size for axis in self.ranks.mesh.weight_axes if not isinstance(placed[axis], Shard))

    def take(self, whole: Tensor, slot: Slot) -> Tensor:
        """This process's shard; a view if the shard is one rectangle. Raises ValueError if `whole` does not have the
        parameter's shape."""
        if not slot.placement:
            return whole
        expected = self.whole_shape(slot)
        if tuple(whole.shape) != expected:
            raise ValueError(
                f"parameter {slot.name} has shape {expected}, but the value has shape {tuple(whole.shape)}"
            )
        return local_shard(whole, self.placements(slot), self.ranks.mesh, self.ranks.rank)

    def join(self, shard: Tensor, slot: Slot, device: torch.device) -> Tensor:
        """The whole parameter; on the CPU if it is more than this shard. All processes call it, for one shard after the
        other; they exchange through `device`."""
        placed = list(zip(self.placements(slot), self._axes, strict=True))
        if placed:
            self.ranks.meet_alike("gathering tensors, as state_dict() does")
        for placement, axis in reversed(placed):
            if isinstance(placement, Shard):
                shard = join_shards(self._gather(shard, axis, device), placement)
        return shard

    def _gather(self, shard: Tensor, axis: Axis, device: torch.device) -> list[Tensor]:
        flat = shard.detach().reshape(-1)
        found = torch.empty(axis.size, flat.numel(), dtype=flat.dtype)
        for start in range(0, flat.numel(), PIECE):
            mine = flat[start : start + PIECE].to(device)
            every = mine.new_empty(axis.size * mine.numel())
            self.ranks.call(all_gather_single, every, mine, group=self.ranks.groups[axis.name,])
            found[:, start : start + mine.numel()] = every.view(axis.size, -1)
        return [row.view(shard.shape) for row in found]

    def norm(self, norm: Tensor) -> Tensor:
        """The norm over all shards along the weight axes, from the `norm` of each process's. To count once, a shard
        that several processes have must enter divided by the square root of `replicas`."""
        axes = self.ranks.mesh.weight_axes
        if not (axes and self.ranks.together):
            return norm
        self.ranks.meet_alike("the norm of gradients")
        squares = norm.square()
        for axis in axes:
            self.ranks.call(dist.all_reduce, squares, group=self.ranks.groups[axis.name,])
        return squares.sqrt()

    def regions(self, slot: Slot, held: tuple[int, int] | None = None) -> tuple[Region, ...]:
        """The rectangles of the parameter that this process has, as places in the slot's chunk.

        If the chunk is divided, `held` is the (start, end) of the chunk's elements that this process has, and regions
        count from that start.
        """
        first, last = (0, slot.offset + slot.numel) if held is None else held
        lo, hi = max(slot.offset, first), min(slot.offset + slot.numel, last)
        runs = [self._runs(slot, dim) for dim in range(len(slot.shape))]
        strides = tuple(prod(slot.shape[dim + 1 :]) for dim in range(len(slot.shape)))
        return tuple(
            Region(
                tuple(piece.whole for piece in pieces),
                tuple(piece.length for piece in pieces),
                slot.offset - first + sum(piece.local * stride for piece, stride in zip(pieces, strides, strict=True)),
                strides,
            )
            for box in _boxes(slot.shape, lo - slot.offset, hi - slot.offset)
            for pieces in product(*(_within(run, *extent) for run, extent in zip(runs, box, strict=True)))
        )

    def _runs(self, slot: Slot, dim: int) -> list["_Run"]:
        """The indices along a dimension that this process has, as a minimal list of contiguous runs."""
        mesh, whole = self.ranks.mesh, self.whole_shape(slot)[dim]
        sharded = [(p, axis) for p, axis in zip(self.placements(slot), self._axes, strict=True) if _shards(p, dim)]
        if not sharded:
            return [_Run(0, 0, whole)]
        cut = lambda at, placed: take_shard(  # noqa: E731
            at, Shard(0, placed[0].sections), mesh.coordinate(self.ranks.rank, placed[1].name), placed[1].size
        )
        indices = reduce(cut, sharded, torch.arange(whole))
        starts = [0, *(torch.nonzero(indices.diff() != 1).flatten() + 1).tolist(), len(indices)]
        return [_Run(int(indices[a]), a, b - a) for a, b in pairwise(starts)]

    @property
    def _axes(self) -> tuple[Axis, ...]:
        return self.ranks.mesh.tensor_axes


ALONE = LocalShards(Ranks())


@dataclass(frozen=True)
class _Run:
    """A run of indices along one dimension: its start in the whole, its start in the shard, and its length."""

    whole: int
    local: int
    length: int


def _shards(placement: object, dim: int) -> bool:
    return isinstance(placement, Shard) and placement.dim == dim


def _within(runs: Iterable[_Run], start: int, end: int) -> Iterator[_Run]:
    """The parts of `runs` that lie between two indices of the shard."""
    for run in runs:
        lo, hi = max(run.local, start), min(run.local + run.length, end)
        if lo < hi:
            yield _Run(run.whole + lo - run.local, lo, hi - lo)


def _boxes(shape: tuple[int, ...], lo: int, hi: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Divides the elements `lo` to `hi` of a contiguous tensor into rectangles, each a (start, end) per dimension."""
    if lo >= hi:
        return
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    first, last = lo // row, (hi - 1) // row
    if first == last:
        yield from (((first, first + 1), *rest) for rest in _boxes(shape[1:], lo - first * row, hi - first * row))
        return
    begins, ends = first + (lo > first * row), last + (hi == (last + 1) * row)
    if begins > first:
        yield from (((first, begins), *rest) for rest in _boxes(shape[1:], lo - first * row, row))
    if begins < ends:
        yield ((begins, ends), *((0, size) for size in shape[1:]))
    if ends <= last:
        yield from (((last, last + 1), *rest) for rest in _boxes(shape[1:], 0, hi - last * row))
