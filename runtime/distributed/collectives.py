"""Exchange between the processes along one axis of the mesh: what the sharded program's instructions do."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..isa.errors import StateError
from ..isa.mesh import Mesh

# torch 2.13 has given them new names, and warns of the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Collectives:
    """The instructions of a sharded program, by the names they have there, and all collectives under way.

    `groups` has the process group of each axis, by (its name,); `call` runs one of torch.distributed's functions and
    turns its failure into an error of ours. The launching thread alone starts collectives, in the program's order,
    which is the same everywhere.
    """

    def __init__(self, mesh: Mesh, rank: int, groups: Mapping[tuple[str, ...], Any], call: Callable[..., Any]) -> None:
        self.mesh = mesh
        self.rank = rank
        self.groups = groups
        self.call = call
        self._under_way: dict[int, tuple[Tensor, Callable[[], None]]] = {}

    def start(self, filled: Tensor, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Start one of torch.distributed's functions, which fills a tensor: nobody may read that before `finish`."""
        work = self.call(collective, *args, **kwargs, async_op=True)
        self._under_way[id(filled)] = filled, waiting(work, collective)
        return filled

    def is_under_way(self, filled: Tensor) -> bool:
        return id(filled) in self._under_way

    def finish(self, filled: Tensor) -> None:
        """From here on what is launched sees the tensor filled. Raises StateError where another process is lost."""
        _, wait = self._under_way.pop(id(filled))
        self.call(wait)

    def abandon(self) -> None:
        """Wait for all that is under way, of a step that failed: whatever ended it may have ended other processes."""
        for filled, _ in list(self._under_way.values()):
            with suppress(StateError, RuntimeError):
                self.finish(filled)

    # -- instructions --------------------------------------------------------------------------------------

    def start_all_gather(self, shard: Tensor, axis: str, size: int) -> Tensor:
        """Start to join all processes' shards, one behind the other."""
        whole = shard.new_empty((size * shard.shape[0], *shard.shape[1:]))
        return self.start(whole, all_gather_single, whole, shard, group=self.groups[axis,])

    def start_reduce_scatter(self, partial: Tensor, axis: str, size: int) -> Tensor:
        """Start to make this process's shard of the sum."""
        mine = partial.new_empty((partial.shape[0] // size, *partial.shape[1:]))
        return self.start(mine, reduce_scatter_single, mine, partial, group=self.groups[axis,])

    def start_all_reduce(self, partial: Tensor, axis: str, reduction: str) -> Tensor:
        """Start to replace every element by the sum, or the largest, of all processes'."""
        return self.start(partial, dist.all_reduce, partial, op=REDUCTIONS[reduction], group=self.groups[axis,])

    def finish_collective(self, pending: Tensor, shard: Tensor | None = None) -> Tensor:
        """From here on the tensor that was being filled is read; `shard`, what it was filled from, may be freed."""
        self.finish(pending)
        return pending

    def local(self, whole: Tensor, dim: int, axis: str, size: int) -> Tensor:
        """This process's shard, along `dim`, of a tensor that all have: a copy, for kernels that need it contiguous."""
        length = whole.shape[dim] // size
        shard = whole.narrow(dim, self.mesh.coordinate(self.rank, axis) * length, length)
        return shard.clone(memory_format=torch.contiguous_format)

    def offset(self, like: Tensor, axis: str, extent: int) -> Tensor:
        """Where this process's shard begins, of shards of `extent`: an int64 scalar."""
        return torch.full((), self.mesh.coordinate(self.rank, axis) * extent, dtype=torch.int64, device=like.device)


def waiting(work: Any, collective: Callable[..., Any]) -> Callable[[], None]:
    """A function that waits for what a collective has begun, by whose name errors tell of it."""

    @wraps(collective)
    def wait() -> None:
        work.wait()

    return wait
