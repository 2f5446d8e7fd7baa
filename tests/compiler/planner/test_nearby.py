"""The chosen plan against all that are one step away from it, on chains so short that all can be weighed."""

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from geminifx.compiler.lowering import Flat
from geminifx.compiler.planner.liveness import ACTIVATIONS, Interval, Liveness
from geminifx.compiler.planner.memory import Limits
from geminifx.compiler.planner.search import Constraints, Weighed, solve
from geminifx.compiler.planner.timeline import Instruction, Timeline
from geminifx.compiler.rates.rates import Products, Rates
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Program
from geminifx.passes.program.request import Request
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.formats import OwnFormat, StateFormat, TorchFormat
from geminifx.runtime.isa.homes import Home, Homes, Where, with_home
from geminifx.runtime.isa.instructions import ACCUMULATE_GRAD, FETCH, REDUCE, WAIT
from geminifx.runtime.isa.layout import ChunkLayout, Layout

PARAMS, KEPT_BYTES = 100, 600
"""Of a block: what it trains, and what its backward reads."""

# A block computes for a second and for two, and a copy of its weights, updates on the host and states on their way take
# as long as that, or less, or more.
RATES = Rates("a machine of few bytes", *(3 * [Products.of_any_size(1.0)]), memory_bytes_per_s=float("inf"),
              kernel_s=0.0, launch_s=0.0, up_bytes_per_s=200, down_bytes_per_s=200, both_bytes_per_s=150,
              host_params_per_s=60, passing_params_per_s=300, torch_params_per_s=20, device_params_per_s=1000,
              network_bytes_per_s=100, network_latency_s=0.0, overlaps=True)  # fmt: skip
HOMES = [Home(where, stays) for where in Where for stays in (False, True)]


def chain(plan: Plan, blocks: int) -> Weighed:
    """Blocks one after the other, forward and back, each with a chunk of its own."""
    instructions, at_s, again = list[Instruction](), 0.0, {int(name) for name in plan.recompute}
    for block in range(blocks):
        instructions += [(at_s, FETCH, block), (at_s, WAIT, block)]
        at_s += 1
    for block in reversed(range(blocks)):
        instructions += [(at_s, FETCH, block), (at_s, WAIT, block)]
        at_s += 3 if block in again else 2
        instructions += [(at_s, REDUCE, block), (at_s, ACCUMULATE_GRAD, block)]
    kept = np.zeros(2 * blocks, dtype=np.int64)
    for block in range(blocks):
        last = 2 * blocks - 1 - block
        kept[last if block in again else block : last + 1] += KEPT_BYTES
    fetches = [Interval(block, at, at) for block in range(blocks) for at in (block, 2 * blocks - 1 - block)]
    liveness = Liveness({ACTIVATIONS: kept}, tuple(fetches), 0, 2 * blocks, 0)
    return Weighed(Flat(Program("training")), liveness, Timeline(instructions, at_s, at_s))


def draft(blocks: int, format: StateFormat) -> Plan:
    chunks = (ChunkLayout(i, PARAMS, torch.bfloat16, torch.float32, True, ()) for i in range(blocks))
    return Plan(Request("auto"), layout=Layout(tuple(chunks)), format=format)


def names(blocks: int) -> tuple[str, ...]:
    return tuple(map(str, range(blocks)))


@pytest.mark.parametrize("format", [TorchFormat(), OwnFormat(), OwnFormat(in_backward=True)], ids=str)
@pytest.mark.parametrize("bus, host", [(1.0, 1.0), (4.0, 1.0), (0.5, 0.25)], ids=["all alike", "bus", "no host"])
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
