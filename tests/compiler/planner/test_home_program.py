"""The integer program against every way to place tiny chains, and what it must never do on any."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
from chains import HOMES, RATES, chain, draft, names
from geminifx.compiler.planner.home_choice import candidates, fitting, landing_apart, least
from geminifx.compiler.planner.home_program import ASSUMED, Assumed, Blocks, HomeProgram
from geminifx.compiler.planner.linear import GAP, Rows
from geminifx.compiler.planner.memory import Limits
from geminifx.compiler.planner.search import Constraints, solve
from geminifx.compiler.planner.simulate import HOST, StepTime
from geminifx.compiler.planner.solution import Solution
from geminifx.compiler.planner.timeline import Carrier
from geminifx.compiler.rates.rates import Rates
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.formats import OwnFormat, StateFormat, TorchFormat
from geminifx.runtime.isa.homes import Home, Homes, Where
from hypothesis import given, settings
from hypothesis import strategies as st

FORMATS = [TorchFormat(), OwnFormat(), OwnFormat(in_backward=True)]
PLAIN = Assumed(1.0, 1.0)
UP, DOWN = Carrier.UP.value, Carrier.DOWN.value


def solved(blocks: int, format: StateFormat, limits: Limits, recompute: tuple[str, ...] | None = ()) -> Solution:
    given = Constraints(recompute, names(blocks))
    return solve(draft(blocks, format), partial(chain, blocks=blocks), limits, given)


def with_rates(bus: float, host: float) -> Rates:
    """A bus and a host so many times as fast."""
    copies = {f"{way}_bytes_per_s": bus * getattr(RATES, f"{way}_bytes_per_s") for way in ("up", "down", "both")}
    return replace(RATES, host_params_per_s=host * RATES.host_params_per_s, **copies)


def every_way(blocks: int, format: StateFormat) -> list[Homes]:
    return list(product([home for home in HOMES if format.beside or not home.streamed], repeat=blocks))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("bus, host", [(1.0, 1.0), (4.0, 0.5), (0.5, 2.0)], ids=["all alike", "bus", "host"])
def test_few_ways_to_place_a_tiny_chain_are_faster_and_none_by_much(bus: float, host: float,
                                                                    format: StateFormat) -> None:  # fmt: skip
    """The program takes it that weights which do not stay are the last ones'. Where one chunk is a third of all, and
    has its turn while little else is there, another one may be better."""
    blocks, plan, slower = 3, draft(3, format), list[float]()
    for budget in range(600, 6000, 450):
        limits = Limits(budget, 0, 10**9, with_rates(bus, host))
        memory, time = chain(plan, blocks).on(plan, limits)
        fit = [homes for homes in every_way(blocks, format) if memory.fits(homes)]
        if fit:
            ways = [*fit, *(landing_apart(plan, homes) for homes in fit)]
            fastest_s = min(time.seconds(plan, homes) for homes in ways)
            slower.append(solved(blocks, format, limits).plan.estimate.step_s / fastest_s)
    assert len(slower) > 7 and max(slower) < 1.2
    assert sum(ratio > 1.03 for ratio in slower) <= 2, slower


@given(st.integers(300, 9000), st.integers(500, 20_000), st.floats(0.1, 10), st.floats(0.1, 10),
       st.sampled_from(FORMATS), st.sampled_from([(), None]))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_whatever_the_machine_a_plan_fits_and_is_no_slower_than_all_on_the_host(
        budget: int, host_bytes: int, bus: float, host: float, format: StateFormat,
        recompute: tuple[str, ...] | None) -> None:  # fmt: skip
    blocks = 4
    limits = Limits(budget, 0, host_bytes, with_rates(bus, host))
    plan = draft(blocks, format)
    memory, time = chain(plan, blocks).on(plan, limits)
    streamed = (Home(),) * blocks
    try:
        found = solved(blocks, format, limits, recompute).plan
    except BudgetError:
        assert not memory.fits(streamed) or memory.beyond_host(streamed)
        return
    assert found.peak_bytes <= budget and found.estimate.host_bytes <= host_bytes
    if memory.fits(streamed) and not memory.beyond_host(streamed):
        assert found.estimate.step_s <= (1 + 1e-9) * time.seconds(plan, streamed)


def test_copies_keep_the_host_busy_by_their_bytes() -> None:
    """Also those of chunks that the host does not update, as it updates others meanwhile."""
    plan, limits = draft(3, OwnFormat(in_backward=True)), Limits(10**6, 0, 10**9, RATES)
    memory, time = chain(plan, 3).on(plan, limits)
    slower = replace(RATES, passing_bytes_per_s=RATES.passing_bytes_per_s / 2)
    begin = (Home(),) * 3
    found, more = (
        HomeProgram(plan, memory, StepTime(time.program, rates), begin, False).choices for rates in (RATES, slower)
    )
    for one, other in zip(found, more, strict=True):
        moved = (one.busy_s.get(UP, 0.0) + one.busy_s.get(DOWN, 0.0)) * RATES.both_bytes_per_s
        assert other.busy_s[HOST] - one.busy_s[HOST] == pytest.approx(moved / RATES.passing_bytes_per_s)
    assert any(one.home.streamed and one.busy_s[HOST] > 0 for one in found)


def test_all_ways_that_are_weighed_fit() -> None:
    for format, budget in product(FORMATS, range(600, 9000, 700)):
        plan, limits = draft(6, format), Limits(budget, 0, 10**9, RATES)
        memory, time = chain(plan, 6).on(plan, limits)
        found = candidates(plan, memory, time, None, ASSUMED)
        begin = least(plan, None)
        assert all(map(memory.fits, found)) or found == [begin, landing_apart(plan, begin)]


def test_states_that_are_placed_stay_and_only_weights_move() -> None:
    plan, limits = draft(4, OwnFormat()), Limits(3500, 0, 10**9, RATES)
    memory, time = chain(plan, 4).on(plan, limits)
    placed = (Home(Where.DEVICE), Home(Where.STREAMED), Home(), Home(spare=True))
    for homes in candidates(plan, memory, time, placed, ASSUMED):
        assert [(home.where, home.spare) for home in homes] == [(home.where, home.spare) for home in placed]


def test_blocks_are_kept_as_far_as_their_room_is_worth_it() -> None:
    """Each saves a second, and takes room: of none but itself where there is plenty, of weights and states else."""
    plan = draft(4, OwnFormat(in_backward=True))
    kept = []
    for budget in (10**6, 2500, 1000):
        memory, time = chain(plan, 4).on(plan, Limits(budget, 0, 10**9, RATES))
        program = HomeProgram(plan, memory, time, least(plan, None), is_placed=False)
        answer = fitting(program, PLAIN, Blocks(4, 200.0, 200.0, 1.0))
        kept.append(0 if answer is None else answer.kept)
    assert kept[0] == 4 and kept == sorted(kept, reverse=True) and kept[-1] < 4


def test_a_program_without_an_answer_has_none() -> None:
    rows = Rows()
    column = rows.columns([1.0], integer=True)
    rows.add(column.of([1.0]), most=3.0, least=2.0)
    assert rows.minimise(column.of([1.0])) is None


def test_the_fewest_are_taken_that_suffice() -> None:
    rows = Rows()
    boxes = rows.columns([10.0, 10.0], integer=True)
    rows.add(boxes.of([3.0, 5.0]), most=100.0, least=17.0)
    found = boxes.values(rows.minimise(boxes.of([3.1, 5.0])))  # type: ignore[arg-type]
    assert 3.1 * found[0] + 5 * found[1] <= (1 + GAP) * 18.3
