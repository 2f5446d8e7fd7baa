"""Exchange between the processes along one axis of the mesh: what the sharded program's instructions do."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .mesh import Mesh

# torch 2.13 has given them new names, and warns of the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def exchange_workspace_bytes(num_bytes: int, dim: int, contiguous: bool) -> int:
    """Memory inside `all_gather` or `reduce_scatter` besides argument and result; `num_bytes` has the larger of these.

    Processes exchange consecutive memory: along another dimension than the first it is laid out anew.
    """
    return 0 if dim == 0 and contiguous else num_bytes


class Collectives:
    """The instructions of a sharded program, by the names they have there.

    `groups` has the process group of each axis; `call` runs one of torch.distributed's functions and turns its
    failure into an error of ours.
    """

    def __init__(self, mesh: Mesh, rank: int, groups: Mapping[str, Any], call: Callable[..., None]) -> None:
        self.mesh = mesh
        self.rank = rank
        self.groups = groups
        self.call = call

    def all_gather(self, part: Tensor, dim: int, axis: str, size: int) -> Tensor:
        """The whole of a tensor that is sharded along `dim`."""
        part = part.movedim(dim, 0).contiguous()
        whole = part.new_empty((size * part.shape[0], *part.shape[1:]))
        self.call(all_gather_single, whole, part, group=self.groups[axis])
        del part
        return whole.movedim(0, dim).contiguous()

    def reduce_scatter(self, part: Tensor, dim: int, axis: str, size: int) -> Tensor:
        """This process's part, along `dim`, of the sum."""
        part = part.movedim(dim, 0).contiguous()
        mine = part.new_empty((part.shape[0] // size, *part.shape[1:]))
        self.call(reduce_scatter_single, mine, part, group=self.groups[axis])
        del part
        return mine.movedim(0, dim).contiguous()

    def all_reduce(self, part: Tensor, axis: str, reduction: str) -> Tensor:
        """The sum, or the largest, of every element."""
        whole = part.clone(memory_format=torch.contiguous_format)
        self.call(dist.all_reduce, whole, op=REDUCTIONS[reduction], group=self.groups[axis])
        return whole

    def local(self, whole: Tensor, dim: int, axis: str, size: int) -> Tensor:
        """This process's part, along `dim`, of a tensor that all have: a copy, for kernels that need it contiguous."""
        length = whole.shape[dim] // size
        part = whole.narrow(dim, self.mesh.coordinate(self.rank, axis) * length, length)
        return part.clone(memory_format=torch.contiguous_format)

    def offset(self, like: Tensor, axis: str, extent: int) -> Tensor:
        """Where this process's part begins, of parts of `extent`: an int64 scalar."""
        return torch.full((), self.mesh.coordinate(self.rank, axis) * extent, dtype=torch.int64, device=like.device)
