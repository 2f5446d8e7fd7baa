"""The chosen plan against all that are one step away from it, on chains so short that all can be weighed."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
from chains import HOMES, RATES, chain, draft, names
from geminifx.compiler.planner.memory import Limits
from geminifx.compiler.planner.search import Constraints, solve
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.formats import OwnFormat, StateFormat, TorchFormat
from geminifx.runtime.isa.homes import Home, Homes, with_home

FORMATS = [TorchFormat(), OwnFormat(), OwnFormat(in_backward=True)]
MACHINES = {"all alike": (1.0, 1.0), "bus": (4.0, 1.0), "no host": (0.5, 0.25)}
EACH_ONCE = [
    pytest.param(bus, host, format, marks=() if i == j else pytest.mark.slow, id=f"{name}-{format}")
    for i, (name, (bus, host)) in enumerate(MACHINES.items())
    for j, format in enumerate(FORMATS)
]
"""Of all pairs, those of one diagonal run quickly."""


@pytest.mark.parametrize("bus, host, format", EACH_ONCE)
def test_no_plan_one_step_away_is_three_percent_faster(bus: float, host: float, format: StateFormat) -> None:
    """Where the host is slow there are homes that no way to fill the device finds, and single moves do."""
    blocks = 4
    copies = {f"{way}_bytes_per_s": bus * getattr(RATES, f"{way}_bytes_per_s") for way in ("up", "down", "both")}
    rates = replace(RATES, host_params_per_s=host * RATES.host_params_per_s, **copies)
    lower = partial(chain, blocks=blocks)
    given = Constraints(None, names(blocks))
    chosen = 0
    for budget in range(600, 12_000, 600):
        limits = Limits(budget, 0, 10**9, rates)
        try:
            plan = solve(draft(blocks, format), lower, limits, given).plan
        except BudgetError:
            continue
        chosen += 1
        for other in _one_step_away(plan, blocks):
            memory, time = lower(other).on(other, limits)
            if memory.fits(other.homes):
                assert plan.estimate.step_s <= 1.03 * time.seconds(other, other.homes), (budget, plan, other.homes)
    assert chosen > 8


def _one_step_away(plan: Plan, blocks: int) -> list[Plan]:
    """One chunk in any other home, or one block recomputed more or less."""
    count = len(plan.recompute)
    recomputed = [names(blocks)[:near] for near in (count - 1, count + 1) if 0 <= near <= blocks]
    homes = (with_home(plan.homes, i, home) for i, home in product(range(blocks), HOMES) if _may_be(home, plan.format))
    return [*(replace(plan, recompute=near) for near in recomputed), *(replace(plan, homes=near) for near in homes)]


def _may_be(home: Home, format: StateFormat) -> bool:
    return format.beside or not home.streamed


def test_the_next_best_plans_are_told_with_what_they_take() -> None:
    limits = Limits(5_000, 0, 10**9, RATES)
    lower, given = partial(chain, blocks=4), Constraints(None, names(4))
    plan = solve(draft(4, OwnFormat()), lower, limits, given).plan
    assert [other.what.split()[0] for other in plan.alternatives].count("recompute") == 1, "the fastest of its kind"
    assert len(plan.alternatives) > 1
    assert list(plan.alternatives) == sorted(plan.alternatives, key=lambda other: other.step_s)
    assert len({other.what for other in plan.alternatives}) == len(plan.alternatives)
    for other in plan.alternatives:
        assert other.peak_bytes <= 5_000 and other.step_s >= 0.99 * plan.estimate.step_s
        assert f"with {other.what}" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan


def test_what_an_alternative_is_said_to_take_it_takes() -> None:
    limits, given = Limits(5_000, 0, 10**9, RATES), Constraints(None, names(4))
    lower = partial(chain, blocks=4)
    plan = solve(draft(4, OwnFormat()), lower, limits, given).plan
    found = {other.what: other for other in plan.alternatives}
    moves: dict[str, Homes] = {
        f"chunk {i}: {home.text}, not {plan.homes[i].text}": with_home(plan.homes, i, home)
        for i, home in product(range(4), HOMES)
    }
    assert found.keys() & moves.keys()
    memory, time = lower(plan).on(plan, limits)
    for what in found.keys() & moves.keys():
        assert found[what].step_s == time.seconds(plan, moves[what])
        assert found[what].peak_bytes == memory.peak(moves[what])
    for count in range(5):
        exact = solve(draft(4, OwnFormat()), lower, limits, replace(given, recompute=names(count))).plan
        told = found.get(f"recompute {count} block(s)")
        assert told is None or told.step_s >= exact.estimate.step_s
