"""The planner on programs of a few chunks: what fits is chosen, room is filled, refusals name what would do."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from geminifx.compiler.lowering import Flat
from geminifx.compiler.planner.memory import Limits
from geminifx.compiler.planner.pipeline.schedules import Shape, make_schedule
from geminifx.compiler.planner.search import Constraints, _Search, check, solve
from geminifx.compiler.planner.solution import Solution
from geminifx.compiler.planner.weighed import Weighed
from geminifx.compiler.rates.presets import preset
from geminifx.compiler.rates.rates import ARENA, Rates
from geminifx.passes.program.estimate import Estimate
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Program
from geminifx.passes.program.request import Policy, Request
from geminifx.passes.program.text import parse_program
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.isa.schedule import Schedule
from homes import homes
from hypothesis import given, settings
from hypothesis import strategies as st

CHUNKS, NUMEL = 4, 64
WEIGHTS = 4 * NUMEL  # bytes of a chunk that computes
STATE = 16 * NUMEL  # and of its master, gradients and optimizer state
INPUT = ACTIVATION = 64
EVERYTHING = frozenset(range(CHUNKS))


def layout(trainable: bool = True, dtype: torch.dtype = torch.float32) -> Layout:
    slots = [(Slot(f"w{i}", 0, (NUMEL,)),) for i in range(CHUNKS)]
    return Layout(tuple(ChunkLayout(i, NUMEL, dtype, torch.float32, trainable, s) for i, s in enumerate(slots)))


def lower(plan: Plan, values: int = 16) -> Weighed:
    """A program that uses one chunk after the other, in each with an activation of 64 bytes (so many `values`)
    beside it; with prefetch the next chunk is fetched in front of the release of the last."""
    name = {torch.float32: "f32", torch.bfloat16: "bf16"}[plan.layout.chunks[0].dtype]
    lines = ["def evaluation(", f'    x: "f32[{values}] | input:0",', "):", "    # forward"]
    held: str | None = None
    for i in range(CHUNKS):
        release = [f"    geminifx.release(w{i - 1}, {i - 1})"] if held else []
        fetch = [
            f'    c{i}: "{name}[{NUMEL}] | chunk={i}" = geminifx.fetch({i}, {NUMEL}, {plan.layout.chunks[0].dtype})'
        ]
        lines += fetch + release if plan.prefetch else release + fetch
        lines += [
            f'    w{i}: "{name}[{NUMEL}] | chunk={i}" = geminifx.wait(c{i}, {i})',
            f'    y{i}: "f32[{values}]" = aten.exp.default(x)',
        ]
        held = f"w{i}"
    lines += [f"    geminifx.release({held}, {CHUNKS - 1})", "    return {}"]
    return weighed("\n".join(lines) + "\n", plan)


def weighed(text: str, plan: Plan, rates: Rates = ARENA) -> Weighed:
    return Weighed.of(Flat(parsed(text)), plan, rates)


parsed = cache(parse_program)


ON_DEMAND = INPUT + ACTIVATION + WEIGHTS  # one chunk, one activation
AHEAD = INPUT + 2 * WEIGHTS  # while two chunks are there no activation is
ALL = INPUT + ACTIVATION + CHUNKS * STATE


def plan(budget: int | None, policy: Policy = "auto", masters: frozenset[int] | None = None,
         host: int = 10**9, reserve: int = 0, **changes: object) -> Plan:  # fmt: skip
    return solved(budget, policy, masters, host, reserve, **changes).plan


def solved(budget: int | None, policy: Policy, masters: frozenset[int] | None, host: int, reserve: int,
           **changes: object) -> Solution:  # fmt: skip
    draft = replace(Plan(Request(policy, budget), layout()), **changes)  # type: ignore[arg-type]
    return solve(
        draft,
        lower,
        limits(budget, host, reserve),
        Constraints((), (), None if masters is None else homes(CHUNKS, masters)),
    )


def limits(budget: int | None, host: int = 10**9, reserve: int = 0) -> Limits:
    return Limits(budget, reserve, host, ARENA)


@pytest.mark.parametrize(
    "policy, budget, peak, prefetch",
    [
        ("cpu", None, AHEAD, 1),
        ("cpu", AHEAD, AHEAD, 1),
        ("cpu", AHEAD - 1, ON_DEMAND, 0),
        ("cpu", ON_DEMAND, ON_DEMAND, 0),
        ("cuda", None, ALL, 1),
        ("cuda", ALL, ALL, 1),
        ("auto", None, ALL, 1),
        ("auto", ALL, ALL, 1),
        ("auto", ON_DEMAND, ON_DEMAND, 0),
    ],
)
def test_peaks_by_hand(policy: Policy, budget: int | None, peak: int, prefetch: int) -> None:
    found = plan(budget, policy)
    assert (found.peak_bytes, found.prefetch) == (peak, prefetch)
    assert (
        found.homes == homes(CHUNKS, EVERYTHING, EVERYTHING if policy == "auto" else ())
        if peak == ALL
        else homes(CHUNKS)
    )


def test_the_host_holds_the_state_of_what_is_not_on_the_device() -> None:
    staging = 2 * WEIGHTS
    assert plan(None, "cpu").estimate.host_bytes == CHUNKS * STATE + staging
    assert plan(None, "cuda").estimate.host_bytes == 0
    low = plan(None, "cpu", layout=layout(dtype=torch.bfloat16))
    assert low.estimate.host_bytes == CHUNKS * (STATE + 2 * NUMEL) + 2 * 2 * NUMEL
    frozen = plan(None, "cpu", layout=layout(trainable=False))
    assert frozen.estimate.host_bytes == CHUNKS * WEIGHTS
    with pytest.raises(BudgetError, match="raise host_budget") as refused:
        plan(None, "cpu", host=CHUNKS * STATE + staging - 1)
    assert refused.value.smallest_bytes == CHUNKS * STATE + staging


def test_weights_come_before_whole_states() -> None:
    all_weights = INPUT + ACTIVATION + CHUNKS * WEIGHTS
    found = plan(all_weights)
    assert found.homes == homes(CHUNKS, frozenset(), EVERYTHING) and found.peak_bytes == all_weights
    # In fp32 a chunk computes from its master: the state costs the difference.
    found = plan(all_weights + STATE - WEIGHTS)
    assert found.homes == homes(CHUNKS, frozenset({0}), EVERYTHING)
    assert found.peak_bytes == all_weights + STATE - WEIGHTS


def test_a_copy_in_another_dtype_costs_beside_its_master() -> None:
    low = layout(dtype=torch.bfloat16)
    found = plan(10**9, layout=low)
    assert found.peak_bytes == INPUT + ACTIVATION + CHUNKS * (STATE + 2 * NUMEL)
    assert plan(10**9, "cuda", layout=low).peak_bytes == INPUT + CHUNKS * STATE + 2 * 2 * NUMEL


@given(st.integers(ON_DEMAND, ALL + 1000), st.integers(0, 2000))
@settings(max_examples=30, deadline=None)
def test_more_budget_is_never_slower(budget: int, more: int) -> None:
    small, large = plan(budget), plan(budget + more)
    assert small.peak_bytes <= budget
    assert large.estimate.step_s <= 1.01 * small.estimate.step_s


@given(st.integers(1, ON_DEMAND - 1))
def test_a_refusal_names_what_would_do_and_what_takes_the_space(budget: int) -> None:
    with pytest.raises(BudgetError, match=r"weights in flight 256 B, (activations|inputs)") as refused:
        plan(budget)
    assert refused.value.smallest_bytes == ON_DEMAND
    assert plan(ON_DEMAND).peak_bytes == ON_DEMAND


def test_the_reserve_is_part_of_the_budget() -> None:
    assert plan(AHEAD + 1000, "cpu", reserve=1000).peak_bytes == AHEAD + 1000
    with pytest.raises(BudgetError, match=r"driver and libraries 1\.00 kB"):
        plan(ON_DEMAND + 999, "cpu", reserve=1000)


def test_an_allocator_that_fragments_is_left_room_around_the_largest_storage() -> None:
    draft, given = Plan(Request("cpu"), layout()), Constraints((), ())
    huge = partial(lower, values=1000)  # activations of 4 kB beside chunks of 256 bytes
    arena = solve(draft, huge, limits(None), given).plan.estimate
    assert arena.peak_bytes == 4000 + 4000 + WEIGHTS and "holes in the allocator" not in dict(arena.at_peak)

    fragmenting = replace(limits(None), hole_share=0.5)
    memory = solve(draft, huge, fragmenting, given).plan.estimate
    assert memory.peak_bytes == arena.peak_bytes + 2000
    assert dict(memory.at_peak)["holes in the allocator"] == 2000
    assert sum(n for _, n in memory.at_peak) == memory.peak_bytes
    small = solve(draft, lower, fragmenting, given).plan.estimate
    assert dict(small.at_peak)["holes in the allocator"] == ACTIVATION // 2

    with pytest.raises(BudgetError, match=r"holes in the allocator 2\.00 kB") as refused:
        solve(draft, huge, replace(fragmenting, device_bytes=memory.peak_bytes - 1), given)
    assert refused.value.smallest_bytes == memory.peak_bytes


def test_masters_of_a_model_in_training_stay_where_they_are() -> None:
    kept = frozenset({2})
    found = plan(10**9, masters=kept)
    assert found.homes == homes(CHUNKS, kept, EVERYTHING)
    with pytest.raises(BudgetError) as refused:
        plan(ON_DEMAND + STATE - 1, masters=kept)
    assert refused.value.smallest_bytes == ON_DEMAND + STATE


def test_the_users_choice_of_blocks_is_taken_and_otherwise_the_planner_tries_all_and_none() -> None:
    seen: list[tuple[str, ...]] = []

    def watched(candidate: Plan) -> Weighed:
        seen.append(candidate.recompute)
        return lower(candidate)

    draft = Plan(Request("cpu"), layout())
    solve(draft, watched, limits(None), Constraints(("b",), ("a", "b")))
    assert set(seen) == {("b",)}
    seen.clear()
    solution = solve(draft, watched, limits(None), Constraints(None, ("a", "b")))
    assert {(), ("a", "b")} <= set(seen)
    assert solution.plan.recompute == (), "recomputing that saves nothing costs time"


def recomputing(candidate: Plan, blocks: int) -> Weighed:
    """Every one of the blocks keeps 64 bytes, or multiplies once more."""
    return weighed(_recomputing(len(candidate.recompute), blocks), candidate)


@cache
def _recomputing(count: int, blocks: int) -> str:
    kept = f'"f32[{16 * (blocks + 1 - count)}]'
    lines = ["def evaluation(", f'    x: {kept} | input:0",', '    a: "f32[2, 2] | input:1",', "):", "    # forward"]
    lines += [f'    y: {kept}" = aten.exp.default(x)']
    lines += [f'    m{i}: "f32[2, 2]" = aten.mm.default(a, a)' for i in range(count)]
    return "\n".join([*lines, "    return {}"]) + "\n"


@pytest.mark.parametrize("number", [1, 2, 3, 6, 7, 12, 16, 24, 30, 48])
def test_the_planner_recomputes_the_fewest_blocks_that_do(number: int) -> None:
    blocks, draft = tuple(f"b{i}" for i in range(number)), Plan(Request("cpu"), layout())
    lowered = partial(recomputing, blocks=number)
    for count in range(number + 1):
        exact = solve(draft, lowered, limits(None), Constraints(blocks[:count], blocks)).plan
        found = solve(draft, lowered, limits(exact.peak_bytes), Constraints(None, blocks)).plan
        assert found.recompute == blocks[:count]


def offloading(candidate: Plan, blocks: int, rates: Rates) -> Weighed:
    """Every one of the blocks keeps 64 bytes where it begins and 64 more, unless these are on the host; those others
    can be multiplied once more, too."""
    again, there = set(candidate.recompute), set(candidate.offload)
    kept = f'"f32[{16 * (2 * blocks + 1 - len(again | there) - len(there))}]'
    lines = ["def evaluation(", f'    x: {kept} | input:0",', '    a: "f32[2, 2] | input:1",', "):", "    # forward"]
    lines += [f'    m{i}: "f32[2, 2]" = aten.mm.default(a, a)' for i in range(len(again))]
    for i in range(len(there)):
        lines += [
            f'    y{i}: "f32[4]" = aten.view.default(a, [4])',
            f'    h{i}: "f32[4]" = geminifx.offload(y{i})',
            f"    geminifx.depart(y{i}, h{i})",
            f'    r{i}: "f32[4]" = geminifx.reload(h{i})',
            f'    z{i}: "f32[4]" = geminifx.arrive(r{i}, h{i})',
        ]
    return weighed("\n".join([*lines, "    return {}"]) + "\n", candidate, rates)


BLOCKS = tuple(f"b{i}" for i in range(8))


def offloaded(found: Limits, **given: Any) -> Plan:
    choices = {"offload": None, **given}
    constraints = Constraints(choices.pop("recompute", None), BLOCKS, **choices)
    return solve(
        Plan(Request("cpu"), layout()), partial(offloading, blocks=8, rates=found.rates), found, constraints
    ).plan


@pytest.mark.parametrize("count", [2, 4, 6, 8])
def test_where_nothing_else_fits_the_fewest_blocks_are_offloaded_that_do(count: int) -> None:
    exact = offloaded(limits(None), recompute=BLOCKS, offload=BLOCKS[:count])
    tight = limits(exact.peak_bytes)
    found = offloaded(tight)
    assert (found.recompute, found.offload, found.peak_bytes) == (BLOCKS, BLOCKS[:count], exact.peak_bytes)
    with pytest.raises(BudgetError):
        offloaded(tight, offload=())
    with pytest.raises(BudgetError) as refused:
        offloaded(limits(1))
    assert refused.value.smallest_bytes == offloaded(limits(None), recompute=BLOCKS, offload=BLOCKS).peak_bytes


def test_nothing_is_offloaded_where_everything_fits() -> None:
    plan = offloaded(limits(None))
    assert (plan.recompute, plan.offload, plan.estimate.offloaded_bytes) == ((), (), 0)


def with_bus(found: Limits, bytes_per_s: float) -> Limits:
    """The same, but for how fast copies are, and launches, of which an operator as small as here is one more."""
    names = ("up_bytes_per_s", "down_bytes_per_s", "both_bytes_per_s")
    return replace(found, rates=replace(ARENA, launch_s=0.0, **dict.fromkeys(names, bytes_per_s)))


def test_blocks_are_kept_on_the_host_where_that_takes_less_than_recomputing() -> None:
    tight = limits(offloaded(limits(None), recompute=BLOCKS, offload=()).peak_bytes)
    slow_bus = offloaded(with_bus(tight, 1.0))
    assert (slow_bus.recompute, slow_bus.offload) == (BLOCKS, ())
    fast_bus = offloaded(with_bus(tight, 1e12))
    assert (fast_bus.recompute, fast_bus.offload) == ((), BLOCKS)
    chosen = offloaded(with_bus(tight, 1e12), recompute=BLOCKS)
    assert chosen.recompute == BLOCKS, "the user's choice"


def test_the_host_holds_what_is_offloaded() -> None:
    plan = offloaded(limits(None), recompute=BLOCKS, offload=BLOCKS)
    nothing = offloaded(limits(None), recompute=BLOCKS, offload=())
    assert plan.estimate.offloaded_bytes == plan.estimate.host_bytes - nothing.estimate.host_bytes == 16
    tight = limits(plan.peak_bytes, host=plan.estimate.host_bytes - 1)
    with pytest.raises(BudgetError, match=r"with 16 B of offloaded activations.*offload fewer blocks \(offload=\)"):
        offloaded(tight, recompute=BLOCKS, offload=BLOCKS)
    with pytest.raises(BudgetError, match="too small for placement") as refused:
        offloaded(tight)  # nobody asked for what the host has no room for
    assert refused.value.smallest_bytes == nothing.peak_bytes


def test_what_the_host_has_no_room_for_is_not_chosen_for_its_speed() -> None:
    """States go to the device before weights do, and the more blocks are recomputed, the more of them fit there."""
    blocks, draft = tuple(f"b{i}" for i in range(16)), Plan(Request("auto"), layout())

    def solved_within(found: Limits) -> Plan:
        return solve(draft, partial(recomputing, blocks=16), found, Constraints(None, blocks)).plan

    everything = solved_within(limits(None))
    tight = limits(everything.peak_bytes - STATE)
    fastest = solved_within(tight)
    assert fastest.recompute == () and fastest.estimate.host_bytes > 0
    found = [fastest]
    while not found[-1].recompute:  # at first less stays on the device that only computes
        found.append(solved_within(replace(tight, host_bytes=found[-1].estimate.host_bytes - 1)))
        assert found[-1].estimate.host_bytes < found[-2].estimate.host_bytes
    with pytest.raises(BudgetError, match=r"needs .* of host memory, but 0 B may be used") as refused:
        solved_within(replace(limits(ALL // 2), host_bytes=0))
    assert 0 < refused.value.smallest_bytes < CHUNKS * STATE and refused.value.tier == "host"


def test_a_plan_made_elsewhere_is_estimated_anew_and_refused_where_it_does_not_fit() -> None:
    given_plan = replace(plan(None, "cuda"), estimate=plan(None, "cpu").estimate)
    assert given_plan.estimate.step_s > 0 and check(given_plan, lower, limits(ALL)).plan == plan(None, "cuda")
    with pytest.raises(BudgetError) as refused:
        check(given_plan, lower, limits(ALL - 1))
    assert refused.value.smallest_bytes == ALL


def test_the_estimate_says_what_the_peak_consists_of() -> None:
    memory = plan(None, "cpu").estimate
    assert memory.static_bytes == INPUT
    assert memory.at_peak == (("weights in flight", 2 * WEIGHTS), ("inputs and buffers", INPUT))
    assert sum(n for _, n in memory.at_peak) == memory.peak_bytes
    resident = dict(plan(None).estimate.at_peak)
    assert resident["training state"] == CHUNKS * STATE and "weights in flight" not in resident


def test_where_the_host_is_far_too_small_copies_on_demand_are_not_tried() -> None:
    """They take one chunk's weights less of the device, which helps where the host lacks little."""
    draft, seen = Plan(Request("auto"), layout()), list[int]()

    def watched(candidate: Plan) -> Weighed:
        seen.append(candidate.prefetch)
        return lower(candidate)

    everything = CHUNKS * STATE
    for host, tried in ((everything // 4, {1}), (everything, {1, 0})):
        seen.clear()
        with pytest.raises(BudgetError) as refused:
            solve(draft, watched, limits(AHEAD, host), Constraints((), ()))
        assert refused.value.tier == "host"
        assert set(seen) == tried


WIDE = 2**20
"""Elements of an activation that takes long to compute."""


def uneven(plan: Plan, rates: Rates) -> Weighed:
    """A program that computes long with every other chunk and hardly with those in between."""
    lines = [
        "def evaluation(",
        f'    x: "f32[{WIDE}] | input:0",',
        '    z: "f32[16] | input:1",',
        "):",
        "    # forward",
    ]
    fetched = 0
    for i in range(CHUNKS):
        while fetched < min(i + 1 + plan.prefetch, CHUNKS):
            lines.append(
                f'    c{fetched}: "f32[{NUMEL}] | chunk={fetched}" = geminifx.fetch({fetched}, {NUMEL}, torch.float32)'
            )
            fetched += 1
        lines += [
            f'    w{i}: "f32[{NUMEL}] | chunk={i}" = geminifx.wait(c{i}, {i})',
            f'    y{i}: "f32[{16 if i % 2 else WIDE}]" = aten.exp.default({"z" if i % 2 else "x"})',
            f"    geminifx.release(w{i}, {i})",
        ]
    return weighed("\n".join([*lines, "    return {}"]) + "\n", plan, rates)


@pytest.mark.parametrize(
    "copied_s, room, schedule, ahead",
    [(1.0, 10, None, 2), (1.0, 2, None, 1), (0.01, 10, None, 1), (1.0, 10, make_schedule("1f1b", Shape(2, 4)), 1)],
    ids=["one hides two", "no room for two more", "copies are fast", "a pipeline's ranks agree on no plan"],
)
def test_copies_start_further_ahead_where_that_is_faster(copied_s: float, room: int, schedule: Schedule | None,
                                                         ahead: int) -> None:  # fmt: skip
    """A long operator takes 4 seconds. One chunk ahead, the copy that begins behind it has nothing to hide behind."""
    bus = {f"{way}_bytes_per_s": WEIGHTS / copied_s for way in ("up", "down", "both")}
    rates = replace(preset("h200"), launch_s=0.0, kernel_s=0.0, memory_bytes_per_s=8 * WIDE / 4, **bus)
    largest = 4 * (2 * WIDE + 16) + room * WEIGHTS
    found = solve(
        Plan(Request("cpu", largest), layout(trainable=False), schedule=schedule), partial(uneven, rates=rates),
        Limits(largest, 0, 10**9, rates), Constraints((), ()),
    )  # fmt: skip
    assert found.plan.prefetch == ahead
    if copied_s == 1.0:
        assert found.plan.estimate.step_s == pytest.approx(11 - ahead, rel=1e-3)


@pytest.mark.parametrize("given", [None, ()], ids=["the planner chooses", "none are asked for"])
def test_recomputed_blocks_are_counted_again_where_copies_start_further_ahead(given: tuple[str, ...] | None) -> None:
    bus = {f"{way}_bytes_per_s": float(WEIGHTS) for way in ("up", "down", "both")}
    rates = replace(preset("h200"), launch_s=0.0, kernel_s=0.0, memory_bytes_per_s=8 * WIDE / 4, **bus)
    largest, seen = 4 * (2 * WIDE + 16) + 10 * WEIGHTS, set[tuple[int, int]]()

    def watched(candidate: Plan) -> Weighed:
        seen.add((candidate.prefetch, len(candidate.recompute)))
        return uneven(candidate, rates)

    draft = Plan(Request("cpu", largest), layout(trainable=False))
    found = solve(draft, watched, Limits(largest, 0, 10**9, rates), Constraints(given, ("a", "b")))
    assert (found.plan.prefetch, found.plan.recompute) == (2, ())
    assert ((2, 1) in seen) == (given is None)


def test_the_best_plan_of_each_loss_is_refined_unless_it_is_much_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    def solution(fused: bool, step_s: float) -> Solution:
        plan = Plan(fuse_loss=fused, estimate=Estimate(step_s=step_s))
        return Solution(plan, Flat(Program.__new__(Program), ()))

    refined: list[float] = []

    def faster(search: _Search, best: Solution) -> Solution:
        refined.append(best.plan.estimate.step_s)
        return solution(best.plan.fuse_loss, best.plan.estimate.step_s * (0.5 if best.plan.fuse_loss else 1.0))

    monkeypatch.setattr(_Search, "_refined", faster)
    search = _Search(partial(recomputing, blocks=1), limits(None), Constraints(None, ("b0",)))
    near = search._refined_of_each_loss([solution(False, 1.0), solution(True, 1.3), solution(True, 1.05)])
    assert near.plan.fuse_loss and refined == [1.0, 1.05]
    far = search._refined_of_each_loss([solution(False, 1.0), solution(True, 1.3)])
    assert not far.plan.fuse_loss and refined == [1.0, 1.05, 1.0]
