"""ZeRO as it is planned: chunks that divide evenly, a rank's share of memory, and what is refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from geminifx.compiler.planner.packing import divide
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.request import Request
from geminifx.runtime.isa.errors import BudgetError, StateError
from geminifx.runtime.isa.layout import ALIGNMENT_BYTES, ChunkLayout, Layout, Slot
from geminifx.runtime.isa.mesh import Axis, Mesh
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import AdamW
from zoo import MLP, OPT, compiled, smallest_budget

FOUR = Mesh((Axis("data", 4, "data"),))
STAGES = pytest.mark.parametrize("zero", [1, 2, 3])


@cache
def planned(zero: int, **options: object) -> Plan:
    """The plan for one of four processes, of which no other is there."""
    return compiled(OPT, parallel={"data": 4, "zero": zero}, precision="bf16", **options).plan


@given(numel=st.integers(1, 10_000), shards=st.integers(1, 9), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_divided_chunks_are_padded_to_equal_aligned_shards(numel: int, shards: int, dtype: torch.dtype) -> None:
    whole = ChunkLayout(0, numel, dtype, torch.float32, True, (Slot("w", 0, (numel,)),))
    (chunk,) = divide(Layout((whole,)), lambda chunk: shards).chunks
    assert (chunk.shards, chunk.slots) == (shards, whole.slots)
    assert chunk.numel == whole.numel if shards == 1 else chunk.shard_bytes % ALIGNMENT_BYTES == 0
    assert 0 <= chunk.numel - numel < shards * ALIGNMENT_BYTES


@pytest.mark.parametrize(("zero", "trained", "frozen"), [(0, 1, 1), (1, 4, 1), (2, 4, 1), (3, 4, 4)])
def test_what_each_stage_divides(zero: int, trained: int, frozen: int) -> None:
    plan = Plan(Request(zero=zero), mesh=FOUR)
    chunks = [
        ChunkLayout(0, 4, torch.float32, torch.float32, trainable, (), reduced_over=("data",))
        for trainable in (True, False)
    ]
    assert [plan.shards(chunk) for chunk in chunks] == [trained, frozen]
    assert plan.shards(replace(chunks[0], reduced_over=())) == 1, "there is nobody to share with"


@pytest.mark.slow
@STAGES
def test_plans_tell_the_stage_and_come_back_from_json(zero: int) -> None:
    plan = planned(zero)
    assert f"stage {zero}" in str(plan) and {chunk.shards for chunk in plan.layout.chunks} == {4}
    assert Plan.from_json(plan.to_json()) == plan
    again = compiled(OPT, parallel={"data": 4, "zero": zero}, precision="bf16", plan=plan).plan
    assert again.layout == plan.layout and again.estimate == plan.estimate


@pytest.mark.slow
@STAGES
def test_a_rank_holds_a_quarter_of_the_training_state(zero: int) -> None:
    """On the host all of it; on the device but for the weights that programs compute with, below stage 3."""
    alone, options = compiled(OPT, precision="bf16"), {"placement": "cpu"}
    alone.optimizer(AdamW)
    elements = sum(chunk.numel for chunk in alone.plan.layout.chunks)
    on_host = planned(zero, **options).estimate.host_bytes
    assert on_host == pytest.approx(14 * elements / 4, rel=0.03), "masters, moments, and what gradients land in"
    on_device = planned(zero, placement="cuda")
    kept = dict(on_device.estimate.at_peak)
    assert kept["training state"] == pytest.approx(14 * elements / 4, rel=0.03)
    weights = kept.get("resident weights", 0)
    assert weights == (0 if zero == 3 else pytest.approx(2 * elements * 3 / 4, rel=0.03)), "beside the shard's own"


def test_stage_3_takes_less_than_stage_2_and_that_less_than_none() -> None:
    peaks = [planned(zero, placement="cuda").peak_bytes for zero in (2, 3)]
    model = compiled(OPT, parallel={"data": 4}, precision="bf16", placement="cuda")
    model.optimizer(AdamW)
    assert model.plan.peak_bytes > peaks[0] > peaks[1]


def test_stage_3_keeps_no_whole_weights_whatever_the_room() -> None:
    assert all(home.on_device and not home.resident for home in planned(3).homes)
    assert all(home.resident for home in planned(2).homes)


@pytest.mark.slow
def test_a_budget_below_the_least_is_refused_with_the_least_named() -> None:
    least = smallest_budget.__wrapped__(OPT, parallel={"data": 4, "zero": 3}, precision="bf16")
    assert planned(3, device_budget=least).peak_bytes <= least
    with pytest.raises(BudgetError, match="the smallest that works"):
        planned(3, device_budget=least - 1)


def test_a_torch_optimizer_is_refused_with_the_remedy() -> None:
    model = compiled(OPT, parallel={"data": 4, "zero": 2})
    AdamW(model.parameters())
    with pytest.raises(StateError, match=r"zero=2 .* call model\.optimizer\(.*leave zero out"):
        model(**OPT.batch())


def test_our_optimizer_alone_is_refused_for_the_lack_of_others() -> None:
    model = compiled(OPT, parallel={"data": 4, "zero": 3})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.optimizer(AdamW)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing is taken apart"
    with pytest.raises(StateError, match="torchrun --nproc-per-node 4"):
        model(**OPT.batch())


def test_of_one_process_zero_changes_nothing() -> None:
    model = compiled(MLP, parallel={"zero": 3})
    assert model.plan.layout == compiled(MLP).plan.layout and not model.plan.format.beside
    MLP.loss(model, MLP.batch()).backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chunk: replace(chunk, shards=2), r"shards is 2, expected 4, as parallel= says"),
        (lambda chunk: replace(chunk, numel=chunk.numel + 64), r"numel is \d+, expected a multiple of 512"),
    ],
)
def test_plans_whose_shards_do_not_fit_are_refused(change: object, message: str) -> None:
    plan = planned(3)
    layout = replace(plan.layout, chunks=tuple(map(change, plan.layout.chunks)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        planned(3, plan=replace(plan, layout=layout))
