"""Ranks as threads of one process: their collectives add in the order of ranks, in the dtype that they are given."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, TypeVar

from geminifx.runtime.distributed.collectives import reduce_scatter_single
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.mesh import Mesh
from geminifx.runtime.isa.precision import ReduceDtype
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
TIMEOUT_S = 60.0


class Group:
    """Ranks that take their sums together."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size, timeout=TIMEOUT_S)
        self.terms: list[Tensor] = [None] * size  # type: ignore[list-item]

    def sum(self, number: int, term: Tensor) -> Tensor:
        """The sum of all ranks' terms; nobody may change its own before all have it."""
        self.terms[number] = term
        self.barrier.wait()
        total = self.terms[0].clone()
        for other in self.terms[1:]:
            total += other
        self.barrier.wait()
        return total


@dataclass(frozen=True)
class Simulated(Ranks):
    """`counted` are the collectives that this rank took part in."""

    counted: list[str] = field(default_factory=list)

    def call(self, collective: Any, *args: Any, group: tuple[int, Group], **kwargs: Any) -> None:
        number, members = group
        self.counted.append(collective.__name__)
        if collective is dist.all_reduce:
            args[0].copy_(members.sum(number, args[0]))
        else:
            assert collective is reduce_scatter_single
            args[0].copy_(members.sum(number, args[1]).view(len(members.terms), -1)[number])


def on_all(mesh: Mesh, axes: tuple[str, ...], reduce_dtype: ReduceDtype, work: Callable[[Simulated], T]) -> list[T]:
    """What `work` returns on each of the mesh's ranks, which know the groups of these axes."""
    others = [
        tuple(mesh.coordinate(rank, a.name) for a in mesh.axes if a.name not in axes) for rank in range(mesh.size)
    ]
    groups = {place: Group(others.count(place)) for place in set(others)}
    ranks = [
        Simulated(mesh, rank, groups={axes: (mesh.number(rank, axes), groups[others[rank]])}, reduce_dtype=reduce_dtype)
        for rank in range(mesh.size)
    ]
    with ThreadPoolExecutor(mesh.size) as threads:
        return list(threads.map(work, ranks))
