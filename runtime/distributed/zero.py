"""ZeRO: processes that have the same weights keep one shard each of every chunk's training state, instead of all of it.

The stages of Rajbhandari et al. (2020), over N processes, for a chunk whose weights take n bytes:

    stage   a process keeps 1/N of            a backward exchanges         making the weights whole again takes
    1, 2    masters, optimizer state and      n, reduce-scatter            n, all-gather: once a step where they are
            gradients                                                      resident, else for every use
    3       these, and weights                n, reduce-scatter            n, all-gather: for every use

A process updates its shard alone, so its shard of the gradient is all that it needs: in stage 1, too, where the paper
has all gradients everywhere, by an all-reduce of 2 n. So stages 1 and 2 are one here. Gradients of 16 bits are
exchanged as float32, twice n, unless the plan says otherwise: see `reduction`.

Chunks are divided, not parameters: a shard is a range of a chunk, equally long on every process. Only the launching
thread issues collectives, in the program's order, which is the same on all ranks.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..isa.formats import STREAM_PIECE
from ..isa.layout import ChunkLayout
from .collectives import Collectives, all_gather_single
from .ranks import Ranks
from .reduction import all_reduce_, reduce_scatter_


@dataclass(frozen=True)
class Zero:
    """Divides chunks into shards and joins them, for one of `ranks`, in ZeRO's `stage` (0: chunks are not divided)."""

    ranks: Ranks = field(default_factory=Ranks)
    stage: int = 0

    def number(self, layout: ChunkLayout) -> int:
        """The index of this process's shard of a chunk; 0 if the chunk is not divided."""
        return self.ranks.mesh.number(self.ranks.rank, layout.reduced_over) if layout.shards > 1 else 0

    def own(self, whole: Tensor, layout: ChunkLayout) -> Tensor:
        """This process's shard, as a view of a flat tensor as long as the chunk."""
        if layout.shards == 1:
            return whole
        return whole.narrow(0, self.number(layout) * layout.shard_numel, layout.shard_numel)

    def reduce(self, gradients: Tensor, layout: ChunkLayout) -> Tensor:
        """Reduces gradients over the processes; returns this one's shard of the step's gradients, a view of
        `gradients`, whose other elements are overwritten."""
        mine = self.own(gradients, layout)
        if layout.shards == 1:
            all_reduce_(gradients, layout, self.ranks)
        else:
            reduce_scatter_(gradients, mine, layout, self.ranks)
        return mine

    def gather(self, collectives: Collectives, whole: Tensor, shard: Tensor, layout: ChunkLayout) -> None:
        """Starts to fill `whole` with all processes' shards. `shard` may be this process's view of `whole`."""
        collectives.start(whole, all_gather_single, whole, shard, group=self._group(layout))

    def norm(self, norm: Tensor, axes: tuple[str, ...]) -> Tensor:
        """The norm over all shards of chunks that are reduced over `axes`, from the `norm` of each process's shards."""
        if self.stage == 0 or not self.ranks.together or not axes:
            return norm
        self.ranks.meet_alike("the norm of gradients")
        squares = norm.square()
        self.ranks.call(dist.all_reduce, squares, group=self.ranks.groups[axes])
        return squares.sqrt()

    def take(self, value: Tensor, layout: ChunkLayout, slot: int) -> Tensor:
        """The part of a parameter's value that lies in this process's shard, flat if the chunk is divided."""
        return value.reshape(-1)[layout.held(slot, self.number(layout))] if layout.shards > 1 else value

    def join(self, held: Tensor, layout: ChunkLayout, slot: int, device: torch.device) -> Tensor:
        """A parameter's value, joined from what each process's shard holds of it; on the CPU if the chunk is divided.

        All processes call it, for one parameter after the other. They exchange through `device`, a piece at a time.
        """
        if layout.shards == 1:
            return held
        self.ranks.meet_alike("gathering tensors, as state_dict() does")
        whole, mine = torch.empty(layout.slots[slot].numel, dtype=held.dtype), self.number(layout)
        for number in range(layout.shards):
            there = layout.held(slot, number)
            for start in range(there.start, there.stop, STREAM_PIECE):
                stop = min(start + STREAM_PIECE, there.stop)
                if number == mine:
                    moving = held[start - there.start : stop - there.start].to(device)
                else:
                    moving = torch.empty(stop - start, dtype=held.dtype, device=device)
                self.ranks.call(dist.broadcast, moving, group=self._group(layout), group_src=number)
                whole[start:stop] = moving
        return whole.view(layout.slots[slot].shape)

    def _group(self, layout: ChunkLayout) -> Any:
        return self.ranks.groups[layout.reduced_over]


ALONE = Zero()
