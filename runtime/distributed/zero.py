"""ZeRO: of each chunk's training state the processes that have its weights alike keep a shard each, not all of it.

The stages of Rajbhandari et al. (2020), over N processes, for a chunk whose weights take n bytes:

    stage   a process keeps 1/N of            a backward exchanges         and for its weights to be whole again
    1       masters and optimizer state       2 n, all-reduce              n, all-gather: once a step where they are
    2       these, and gradients              n, reduce-scatter            resident, else for every use
    3       these, and weights                n, reduce-scatter            n, all-gather: for every use

Gradients of 16 bits are exchanged as float32, twice that, unless the plan says otherwise: see `reduction`.

Chunks are divided, not parameters: a shard is a range of a chunk, as long on every process. Collectives are
issued by the launching thread alone, in the program's order, which is the same everywhere.
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
    """The shards of this process, one of `ranks`, in one of the stages (0: chunks are not divided)."""

    ranks: Ranks = field(default_factory=Ranks)
    stage: int = 0

    def number(self, layout: ChunkLayout) -> int:
        """Which shard of a chunk is this process's: 0 where it is not divided."""
        return self.ranks.mesh.number(self.ranks.rank, layout.reduced_over) if layout.shards > 1 else 0

    def own(self, whole: Tensor, layout: ChunkLayout) -> Tensor:
        """The view of this process's shard in a flat tensor as long as the chunk."""
        if layout.shards == 1:
            return whole
        return whole.narrow(0, self.number(layout) * layout.shard_numel, layout.shard_numel)

    def reduce(self, gradients: Tensor, layout: ChunkLayout) -> Tensor:
        """This process's shard of the step's gradients: a view of `gradients`, whose other elements are used up."""
        if layout.shards == 1 or self.stage == 1:
            all_reduce_(gradients, layout, self.ranks)
            return self.own(gradients, layout)
        mine = self.own(gradients, layout)
        reduce_scatter_(gradients, mine, layout, self.ranks)
        return mine

    def gather(self, collectives: Collectives, whole: Tensor, shard: Tensor, layout: ChunkLayout) -> None:
        """Start to fill `whole` with all processes' shards. `shard` may be this one's view of `whole`."""
        collectives.start(whole, all_gather_single, whole, shard, group=self._group(layout))

    def norm(self, norm: Tensor, axes: tuple[str, ...]) -> Tensor:
        """The norm of all shards of chunks that are reduced over these axes, of that of each process's."""
        if self.stage == 0 or not self.ranks.together or not axes:
            return norm
        self.ranks.meet_alike("the norm of gradients")
        squares = norm.square()
        self.ranks.call(dist.all_reduce, squares, group=self.ranks.groups[axes])
        return squares.sqrt()

    def take(self, value: Tensor, layout: ChunkLayout, slot: int) -> Tensor:
        """What of a parameter's value lies in this process's shard, flat where the chunk is divided."""
        return value.reshape(-1)[layout.held(slot, self.number(layout))] if layout.shards > 1 else value

    def join(self, held: Tensor, layout: ChunkLayout, slot: int, device: torch.device) -> Tensor:
        """A parameter's value, of what lies in each process's shard; on the CPU where the chunk is divided.

        All processes call it, for one parameter after the other. They exchange by way of `device`, a little at a time.
        """
        if layout.shards == 1:
            return held
        self.ranks.meet_alike("putting tensors together, as state_dict() does")
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
