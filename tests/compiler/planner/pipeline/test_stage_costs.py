"""What a program's own stages take, by which its round-robin schedule is made."""

from dataclasses import replace

import pytest
from geminifx.compiler.planner.pipeline.round_robin import EVEN, round_robin
from geminifx.compiler.planner.pipeline.stage_costs import stage_costs, suited
from geminifx.compiler.rates.rates import ARENA
from pipelines import step_of
from zoo import Case, opt

DEEP = Case("opt, four blocks, not tied", lambda: opt(num_hidden_layers=4, tie_word_embeddings=False))


def test_recomputed_stages_take_their_forward_again() -> None:
    step = step_of(DEEP, 4)
    plan = step.plans(round_robin([EVEN] * 4, 2, 4))[0]
    plain = stage_costs(step.program, plan, ARENA)
    again = stage_costs(step.program, replace(plan, recompute=step.blocks[:-1]), ARENA)
    assert again[-1] == plain[-1]
    assert plain[0].backward_s < again[0].backward_s < plain[0].backward_s + plain[0].forward_s, "no embedding again"
    for one, other in zip(plain[1:-1], again[1:-1], strict=True):
        assert other.backward_s == pytest.approx(one.backward_s + one.forward_s)
    for one, other in zip(plain, again, strict=True):
        assert (other.forward_s, other.weight_s, other.message_s) == (one.forward_s, one.weight_s, one.message_s)
    assert all(0 < cost.weight_s < cost.backward_s for cost in plain[1:]), "nobody waits for the first one"
    loss_s = ARENA.exchange_s(1, 4)
    assert plain[-1].message_s == loss_s and all(cost.message_s > loss_s for cost in plain[:-1])


def test_of_a_stage_only_the_recomputed_blocks_are_computed_again() -> None:
    step = step_of(DEEP, 4)
    plan = step.plans(round_robin([EVEN] * 2, 2, 4))[0]
    chosen = [(), step.blocks[:1], step.blocks[1:2], step.blocks[:2]]
    plain, first, second, both = (stage_costs(step.program, replace(plan, recompute=each), ARENA)[0] for each in chosen)
    first_s, second_s, both_s = (cost.backward_s - plain.backward_s for cost in (first, second, both))
    assert first_s > 0 and first_s == pytest.approx(second_s)
    assert both_s == pytest.approx(first_s + second_s) and both_s < plain.forward_s, "but for the embedding"


def test_the_schedule_suits_them() -> None:
    step = step_of(DEEP, 4)
    plan = step.plans(round_robin([EVEN] * 4, 2, 4))[0]
    costs = stage_costs(step.program, replace(plan, recompute=step.blocks), ARENA)
    assert suited(step.program, plan, step.blocks, ARENA) == round_robin(costs, 2, 4)


def test_an_evaluation_tells_of_forwards_alone() -> None:
    schedule = round_robin([EVEN] * 4, 2, 4)
    trains, evaluates = step_of(DEEP, 4), step_of(DEEP, 4, training=False)
    plans = [step.plans(schedule, recompute=step.blocks[:-1])[0] for step in (trains, evaluates)]
    whole = stage_costs(trains.program, plans[0], ARENA)
    found = stage_costs(evaluates.program, plans[1], ARENA)
    for cost, other in zip(found, whole, strict=True):
        assert cost.forward_s == pytest.approx(other.forward_s, rel=0.1), "but for what a training step saves"
        assert cost.message_s == other.message_s
        assert (cost.input_s, cost.weight_s) == pytest.approx((cost.backward_s - cost.forward_s, cost.forward_s))
    times = [cost.backward_s / cost.forward_s for cost in found]
    assert times[1:] == pytest.approx([3, 3, 2])
    assert 2 < times[0] < 3, "the embedding is not computed again"
