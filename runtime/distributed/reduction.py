"""Sums gradients over the processes that have the same weights, and divides by the number of batches.

bfloat16 has 8 significant bits: summed in it, the terms of 64 processes are off by 0.8 %, of 256 by 1.5 %, where their
mean rounded once is off by 0.17 %. So gradients are summed in float32, then divided by the number of batches, and
rounded once. `reduce_dtype="compute"` halves the traffic: gradients are divided first, in their own dtype, so that sums
of float16 stay in range. torch.distributed sums in the dtype that it is given, so gradients are cast, a piece at a
time, which takes little device memory however long the chunk.

For float32 gradients the order matters little: dividing by a power of two is exact, before the sum or after it, and
dividing by another number after the sum saves each term one rounding, of 2^-24 of itself.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from ..isa.formats import STREAM_PIECE
from ..isa.layout import ChunkLayout
from ..isa.precision import ReduceDtype, sum_dtype
from .collectives import reduce_scatter_single
from .ranks import Ranks


def all_reduce_(gradients: Tensor, layout: ChunkLayout, ranks: Ranks) -> None:
    """Replaces this process's gradients of a chunk by the step's: the mean over its batches."""
    if not (ranks.together and layout.reduced_over):
        return
    group, batches = ranks.groups[layout.reduced_over], ranks.mesh.data_size
    if ranks.reduce_dtype == "compute":
        ranks.call(dist.all_reduce, _divided(gradients, batches), group=group)
        return
    if not casts(layout, ranks.reduce_dtype):
        ranks.call(dist.all_reduce, gradients, group=group)
        _divided(gradients, batches)
        return
    length = piece_numel(layout)
    # One temporary for all pieces: a collective under way may hold on to its own until the next one starts.
    wide = torch.empty(length, dtype=sum_dtype(layout.dtype, ranks.reduce_dtype), device=gradients.device)
    for piece in gradients.split(length):
        total = wide[: piece.numel()].copy_(piece)
        ranks.call(dist.all_reduce, total, group=group)
        piece.copy_(_divided(total, batches))


def reduce_scatter_(gradients: Tensor, mine: Tensor, layout: ChunkLayout, ranks: Ranks) -> None:
    """Reduces a chunk's gradients into `mine`, this process's shard of `gradients`; the other shards are
    overwritten."""
    group, batches = ranks.groups[layout.reduced_over], ranks.mesh.data_size
    if ranks.reduce_dtype == "compute":
        ranks.call(reduce_scatter_single, mine, _divided(gradients, batches), group=group)
        return
    if not casts(layout, ranks.reduce_dtype):
        ranks.call(reduce_scatter_single, mine, gradients, group=group)
        _divided(mine, batches)
        return
    length = piece_numel(layout, scattered=True)
    number = ranks.mesh.number(ranks.rank, layout.reduced_over)
    wide = torch.empty(length, dtype=sum_dtype(layout.dtype, ranks.reduce_dtype), device=gradients.device)
    # A piece is the same range of every shard, so that each process gets its shard of it.
    ranges = gradients.view(layout.shards, -1).split(length // layout.shards, dim=1)
    for elements, shard in zip(ranges, mine.split(length // layout.shards), strict=True):
        terms = wide[: elements.numel()].view(elements.shape).copy_(elements)
        ranks.call(reduce_scatter_single, terms[number], terms.view(-1), group=group)
        shard.copy_(_divided(terms[number], batches))


def casts(layout: ChunkLayout, reduce_dtype: ReduceDtype) -> bool:
    """Whether gradients of a chunk are summed in a dtype other than their own."""
    return sum_dtype(layout.dtype, reduce_dtype) != layout.dtype


def piece_numel(layout: ChunkLayout, *, scattered: bool = False) -> int:
    """How many elements of a chunk are cast and summed at a time: at most about `STREAM_PIECE`, and, if scattered,
    equally many of every shard."""
    shards = layout.shards if scattered else 1
    return shards * max(min(STREAM_PIECE, layout.numel) // shards, 1)


def _divided(total: Tensor, batches: int) -> Tensor:
    return total.div_(batches) if batches > 1 else total
