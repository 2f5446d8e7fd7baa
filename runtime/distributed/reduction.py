"""Sums of gradients over the processes that have the same weights, and the means over batches that they become.

A bfloat16 has 8 bits: added up in it, the terms of 64 processes are off by 0.8 %, of 256 by 1.5 %, where their mean
rounded once is off by 0.17 %. So they are added in float32, then divided by the number of batches, and rounded once,
unless `reduce_dtype="compute"` asks for half of the bytes: then they are divided first, in their own dtype, so that
sums of float16 stay in range. torch.distributed adds in the dtype that it is given, which is why gradients are cast, a
piece at a time: what that takes on the device stays small, however long the chunk.

Of gradients in float32 the order matters little: dividing by a power of two rounds nothing, before the sum or behind
it, and by another number each term is rounded once less behind it, by 2^-24 of itself.
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
    """Replace this process's gradients of a chunk by those of the step."""
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
    # One temporary for all pieces: a collective under way may hold on to its own until it has the next.
    wide = torch.empty(length, dtype=sum_dtype(layout.dtype, ranks.reduce_dtype), device=gradients.device)
    for piece in gradients.split(length):
        total = wide[: piece.numel()].copy_(piece)
        ranks.call(dist.all_reduce, total, group=group)
        piece.copy_(_divided(total, batches))


def reduce_scatter_(gradients: Tensor, mine: Tensor, layout: ChunkLayout, ranks: Ranks) -> None:
    """Make `mine`, this process's shard of its gradients of a chunk, that of the step's. The others are used up."""
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
    # A piece is the same range of every shard, so that each process has its shard of it.
    ranges = gradients.view(layout.shards, -1).split(length // layout.shards, dim=1)
    for elements, shard in zip(ranges, mine.split(length // layout.shards), strict=True):
        terms = wide[: elements.numel()].view(elements.shape).copy_(elements)
        ranks.call(reduce_scatter_single, terms[number], terms.view(-1), group=group)
        shard.copy_(_divided(terms[number], batches))


def casts(layout: ChunkLayout, reduce_dtype: ReduceDtype) -> bool:
    """Whether gradients of a chunk are summed in another dtype than their own."""
    return sum_dtype(layout.dtype, reduce_dtype) != layout.dtype


def piece_numel(layout: ChunkLayout, *, scattered: bool = False) -> int:
    """How many elements of a chunk are cast and summed at a time: about `STREAM_PIECE` at most, as many of every shard
    where sums are scattered."""
    shards = layout.shards if scattered else 1
    return shards * max(min(STREAM_PIECE, layout.numel) // shards, 1)


def _divided(total: Tensor, batches: int) -> Tensor:
    return total.div_(batches) if batches > 1 else total
