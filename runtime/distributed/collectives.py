"""Collectives between the processes along one axis of the mesh: the instructions of sharded programs."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..isa.errors import StateError
from ..isa.mesh import Mesh

# torch 2.13 renamed these, and warns about the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Collectives:
    """Implements a sharded program's instructions under their names, and tracks the collectives under way.

    `groups` maps (axis name,) to the axis's process group; `call` runs a function of torch.distributed and turns its
    failure into an error of ours. Only the launching thread starts collectives, in the program's order, which is the
    same on all ranks.
    """

    def __init__(self, mesh: Mesh, rank: int, groups: Mapping[tuple[str, ...], Any], call: Callable[..., Any]) -> None:
        self.mesh = mesh
        self.rank = rank
        self.groups = groups
        self.call = call
        self._under_way: dict[int, tuple[Tensor, Callable[[], None]]] = {}

    def start(self, filled: Tensor, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Starts a function of torch.distributed that fills a tensor, which must not be read before `finish`."""
        work = self.call(collective, *args, **kwargs, async_op=True)
        self._under_way[id(filled)] = filled, waiting(work, collective)
        return filled

    def is_under_way(self, filled: Tensor) -> bool:
        return id(filled) in self._under_way

    def finish(self, filled: Tensor) -> None:
        """Makes work launched from here on see the tensor filled. Raises StateError if another process is lost."""
        _, wait = self._under_way.pop(id(filled))
        self.call(wait)

    def abandon(self) -> None:
        """Waits for all collectives under way in a step that failed, ignoring errors: the cause may have ended other
        processes."""
        for filled, _ in list(self._under_way.values()):
            with suppress(StateError, RuntimeError):
                self.finish(filled)

    # -- instructions --------------------------------------------------------------------------------------

    def start_all_gather(self, shard: Tensor, axis: str, size: int) -> Tensor:
        """Starts to concatenate all processes' shards along the first dimension."""
        whole = shard.new_empty((size * shard.shape[0], *shard.shape[1:]))
        return self.start(whole, all_gather_single, whole, shard, group=self.groups[axis,])

    def start_reduce_scatter(self, partial: Tensor, axis: str, size: int) -> Tensor:
        """Starts to compute this process's shard of the sum."""
        mine = partial.new_empty((partial.shape[0] // size, *partial.shape[1:]))
        return self.start(mine, reduce_scatter_single, mine, partial, group=self.groups[axis,])

    def start_all_reduce(self, partial: Tensor, axis: str, reduction: str) -> Tensor:
        """Starts to replace every element by the sum or maximum over all processes, in place."""
        return self.start(partial, dist.all_reduce, partial, op=REDUCTIONS[reduction], group=self.groups[axis,])

    def finish_collective(self, pending: Tensor, shard: Tensor | None = None) -> Tensor:
        """Waits for a collective and returns the tensor that it fills; `shard`, which it was filled from, may then be
        freed."""
        self.finish(pending)
        return pending

    def local(self, whole: Tensor, dim: int, axis: str, size: int) -> Tensor:
        """This process's shard, along `dim`, of a replicated tensor: a copy, as kernels may need it contiguous."""
        length = whole.shape[dim] // size
        shard = whole.narrow(dim, self.mesh.coordinate(self.rank, axis) * length, length)
        return shard.clone(memory_format=torch.contiguous_format)

    def offset(self, like: Tensor, axis: str, extent: int) -> Tensor:
        """Where this process's shard of length `extent` starts: an int64 scalar on the device of `like`."""
        return torch.full((), self.mesh.coordinate(self.rank, axis) * extent, dtype=torch.int64, device=like.device)


def waiting(work: Any, collective: Callable[..., Any]) -> Callable[[], None]:
    """A function that waits for `work`, named after its collective for error messages."""

    @wraps(collective)
    def wait() -> None:
        work.wait()

    return wait
