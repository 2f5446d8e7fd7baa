"""One rank of the tests of sums: `torchrun --nproc-per-node 8 reduction_worker.py OUT`.

Every rank sums chunks over several sets of axes of one mesh, and compares with what it computes of all ranks' terms.
Rank 0 writes to OUT which comparisons did not hold anywhere.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from geminifx.runtime.distributed import reduction
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.distributed.zero import Zero
from geminifx.runtime.isa.layout import ChunkLayout, Slot
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.isa.precision import ReduceDtype
from torch import Tensor
from torch import distributed as dist

NUMEL, CPU = 8 * 128, torch.device("cpu")
MESHES = {
    "in a row": Mesh((Axis("data", 8, "data"),)),
    "apart": Mesh((Axis("depth", 2, "replica"), Axis("tp", 2, "tensor"), Axis("data", 2, "data"))),
    "experts": Mesh((Axis("experts", 2, "expert"), Axis("tp", 2, "tensor"), Axis("data", 2, "data"))),
}
SETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "in a row": (("data",),),
    "apart": (("depth", "data"), ("depth",)),
    "experts": (("experts", "data"), ("data",)),
}


def terms(dtype: torch.dtype, ranks: int) -> Tensor:
    """Every rank's gradients: multiples of 2^-8 below 4, of which a float32 adds up thousands without rounding."""
    torch.manual_seed(1)
    return (torch.randint(-1024, 1024, (ranks, NUMEL)) / 256).to(dtype)


def members(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> list[int]:
    """The ranks that differ from this one along these axes alone."""
    place = lambda at: [mesh.coordinate(at, axis.name) for axis in mesh.axes if axis.name not in axes]  # noqa: E731
    return [other for other in range(mesh.size) if place(other) == place(rank)]


def chunk(dtype: torch.dtype, shards: int, axes: tuple[str, ...]) -> ChunkLayout:
    return ChunkLayout(0, NUMEL, dtype, torch.float32, True, (Slot("w", 0, (NUMEL,)),), shards, axes)


def reduced(ranks: Ranks, layout: ChunkLayout, stage: int, given: Tensor) -> Tensor:
    """The whole of the step's gradients, gathered of the shards where they are divided."""
    zero, whole = Zero(ranks, stage), given[ranks.rank].clone()
    mine = zero.reduce(whole, layout)
    if layout.shards > 1:
        collectives = ranks.collectives
        zero.gather(collectives, whole, mine.clone(), layout)
        collectives.finish(whole)
        assert torch.equal(zero.join(zero.take(whole, layout, 0), layout, 0, CPU), whole), "joined as it was taken"
    return whole


def found(name: str, reduce_dtype: ReduceDtype) -> Iterator[tuple[str, bool]]:
    """Comparisons by what they are of, and whether they hold."""
    mesh = MESHES[name]
    ranks = Ranks.of(lambda launched: mesh, CPU, reduce_dtype)
    ranks.join_axes(reversed(SETS[name]), CPU)
    for axes in SETS[name]:
        same = members(mesh, ranks.rank, axes)
        yield f"{axes}: the group", dist.get_process_group_ranks(ranks.groups[axes]) == same
        yield f"{axes}: the number", dist.get_rank(ranks.groups[axes]) == mesh.number(ranks.rank, axes)
        for dtype in (torch.bfloat16, torch.float32):
            given = terms(dtype, mesh.size)
            mean = (given[same].float().sum(0) / mesh.data_size).to(dtype)
            if reduce_dtype == "compute":  # as torch.distributed adds the terms up, in whatever order
                mean = given[ranks.rank] / mesh.data_size
                dist.all_reduce(mean, group=ranks.groups[axes])
            for stage, divided in ((0, False), (1, True), (2, True)):
                layout = chunk(dtype, len(same) if divided else 1, axes)
                equal = torch.equal(reduced(ranks, layout, stage, given), mean)
                yield f"{axes}: {dtype} by stage {stage} in {reduce_dtype}", equal


def main(out: Path) -> None:
    reduction.STREAM_PIECE = 3 * 128  # several of them, the last a shorter one
    broken: list[str] = []
    for name in MESHES:
        for reduce_dtype in ("fp32", "compute"):
            broken += [f"{name}: {what}" for what, holds in found(name, reduce_dtype) if not holds]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, broken)
    if dist.get_rank() == 0:
        torch.save(everywhere, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
