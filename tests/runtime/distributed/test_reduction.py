"""Sums of gradients: what bits they are, in which pieces they are taken, and how much memory that needs."""

from dataclasses import replace

import pytest
import torch
from geminifx.compiler.planner.communication import HELD, collective_bytes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.request import Request
from geminifx.runtime.distributed import reduction
from geminifx.runtime.distributed.zero import Zero
from geminifx.runtime.isa.layout import ChunkLayout, Layout
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.isa.precision import ReduceDtype
from geminifx.runtime.memory.tiers import MemoryMeter
from simulated_ranks import Simulated, on_all
from torch import Tensor

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
STAGES = pytest.mark.parametrize("stage", [0, 1, 2])
RANKS = pytest.mark.parametrize("ranks", [2, 3, 8])
NUMEL = 8 * 3 * 128


def data(ranks: int) -> Mesh:
    return Mesh((Axis("data", ranks, "data"),))


def layout(dtype: torch.dtype, stage: int, mesh: Mesh, axes: tuple[str, ...] = ("data",)) -> ChunkLayout:
    shards = mesh.ranks_over(axes) if stage else 1
    return ChunkLayout(0, NUMEL, dtype, torch.float32, True, (), shards, axes)


def gradients(ranks: int, dtype: torch.dtype) -> Tensor:
    """A row for each rank: multiples of 2^-8 below 4, of which a float32 adds up thousands without rounding."""
    torch.manual_seed(0)
    return (torch.randint(-1024, 1024, (ranks, NUMEL)) / 256).to(dtype)


def reduced(given: Tensor, mesh: Mesh, chunk: ChunkLayout, stage: int, reduce_dtype: ReduceDtype) -> Tensor:
    """The step's gradients as the ranks have them: of those that share them out, all shards one behind the other."""

    def reduce(ranks: Simulated) -> Tensor:
        return Zero(ranks, stage).reduce(given[ranks.rank].clone(), chunk).clone()

    found = on_all(mesh, chunk.reduced_over, reduce_dtype, reduce)
    if chunk.shards == 1:
        assert all(torch.equal(other, found[0]) for other in found), "every rank has the same"
        return found[0]
    return torch.cat(found)


def added_in_turn(terms: Tensor) -> Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


@LOW
@STAGES
@RANKS
def test_a_mean_is_the_float32_one_rounded_once(ranks: int, stage: int, dtype: torch.dtype) -> None:
    given, mesh = gradients(ranks, dtype), data(ranks)
    expected = (given.float().sum(0) / ranks).to(dtype)
    assert torch.equal(reduced(given, mesh, layout(dtype, stage, mesh), stage, "fp32"), expected)


@LOW
@STAGES
@RANKS
def test_in_the_compute_dtype_every_term_and_every_sum_is_rounded(ranks: int, stage: int, dtype: torch.dtype) -> None:
    given, mesh = gradients(ranks, dtype), data(ranks)
    found = reduced(given, mesh, layout(dtype, stage, mesh), stage, "compute")
    assert torch.equal(found, added_in_turn(given / ranks))
    once = (given.float().sum(0) / ranks).to(dtype)
    assert torch.equal(found, once) == (ranks == 2), "the sum of two halves is rounded once as well"


def test_sums_of_float16_that_a_float16_cannot_hold_have_means() -> None:
    mesh, given = data(8), torch.full((8, NUMEL), 49152.0, dtype=torch.float16)
    for reduce_dtype in ("fp32", "compute"):
        assert torch.equal(
            reduced(given, mesh, layout(torch.float16, 1, mesh), 1, reduce_dtype), given.view(-1)[:NUMEL]
        )


@STAGES
@RANKS
def test_gradients_in_float32_are_divided_behind_their_sum(ranks: int, stage: int) -> None:
    mesh = data(ranks)
    torch.manual_seed(0)
    given = torch.randn(ranks, NUMEL)
    chunk = layout(torch.float32, stage, mesh)
    found, before = (reduced(given, mesh, chunk, stage, reduce_dtype) for reduce_dtype in ("fp32", "compute"))
    assert torch.equal(found, added_in_turn(given) / ranks)
    if ranks != 3:
        assert torch.equal(found, before), "dividing by a power of two rounds nothing"
    # Each of the terms is rounded when it is divided, each sum when it is taken: 2^-24 of the largest there is.
    assert (found - before).abs().max() <= 2 * ranks * 2**-24 * given.abs().max()


@STAGES
def test_float64_stays_float64(stage: int) -> None:
    mesh = data(2)
    given = torch.tensor([[1.0, 1.0 + 2**-40]] * (NUMEL // 2), dtype=torch.float64).view(1, -1).repeat(2, 1)
    assert torch.equal(reduced(given, mesh, layout(torch.float64, stage, mesh), stage, "fp32"), given[0])


def test_what_is_summed_over_more_axes_than_have_batches_is_divided_by_the_batches() -> None:
    mesh = Mesh((Axis("tp", 2, "tensor"), Axis("data", 2, "data"), Axis("depth", 3, "replica")))
    given, axes = gradients(mesh.size, torch.bfloat16), ("data", "depth")

    def reduce(ranks: Simulated) -> Tensor:
        return Zero(ranks, 0).reduce(given[ranks.rank].clone(), layout(torch.bfloat16, 0, mesh, axes))

    for rank, found in enumerate(on_all(mesh, axes, "fp32", reduce)):
        mine = given[:6] if rank < 6 else given[6:]
        assert torch.equal(found, (mine.float().sum(0) / 2).bfloat16())


# -- pieces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [64, 100, NUMEL - 1, NUMEL, 2 * NUMEL])
@STAGES
def test_pieces_bring_the_same_bits_within_their_memory(
    monkeypatch: pytest.MonkeyPatch, piece: int, stage: int
) -> None:
    given, mesh, dtype = gradients(3, torch.bfloat16), data(3), torch.bfloat16
    chunk = layout(dtype, stage, mesh)
    whole = reduced(given, mesh, chunk, stage, "fp32")
    monkeypatch.setattr(reduction, "STREAM_PIECE", piece)
    assert torch.equal(reduced(given, mesh, chunk, stage, "fp32"), whole)

    def measure(ranks: Simulated) -> tuple[int, int]:
        mine = given[ranks.rank].clone()
        with MemoryMeter() as meter:
            Zero(replace(ranks, counted=ranks.counted), stage).reduce(mine, chunk)
        return meter.peak_bytes, len(ranks.counted)

    plan = Plan(Request(zero=stage), Layout((chunk,)), mesh)
    # The simulated sum itself is one more tensor, as long as the temporary.
    temporary = 4 * reduction.piece_numel(chunk, scattered=stage > 0)
    assert temporary <= 4 * min(piece, NUMEL)
    for peak_bytes, count in on_all(mesh, ("data",), "fp32", measure):
        assert temporary <= peak_bytes <= 2 * temporary
        assert count == -(-NUMEL * 4 // temporary)
    divided_bytes = chunk.compute_bytes if stage else 0
    assert collective_bytes(plan) == HELD * max(temporary, divided_bytes) + temporary


def test_what_is_not_cast_needs_no_temporary() -> None:
    mesh = data(2)
    full, low = layout(torch.float32, 0, mesh), layout(torch.bfloat16, 0, mesh)
    planned = Plan(mesh=mesh, layout=Layout((full,)))
    assert collective_bytes(planned) == HELD * full.compute_bytes
    assert collective_bytes(replace(planned, layout=Layout((low,)))) == (HELD + 1) * 4 * NUMEL
    assert (
        collective_bytes(replace(planned, layout=Layout((low,)), request=Request(reduce_dtype="compute")))
        == HELD * low.compute_bytes
    )
    assert collective_bytes(Plan(layout=Layout((replace(low, reduced_over=()),)))) == 0, (
        "there is nobody to exchange with"
    )
