"""Schedules on a clock: their bubbles are those of the closed formulas, and what they hold is what they should."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from geminifx.compiler.planner.pipeline.schedules import KINDS, Shape, make_schedule
from geminifx.compiler.planner.pipeline.simulate import Event, Simulated, StageCosts, simulate
from geminifx.runtime.isa.errors import ArgumentError
from geminifx.runtime.isa.schedule import Action, Schedule
from hypothesis import given
from schedules import schedules

SHAPES = [(2, 4), (4, 4), (4, 6), (4, 16), (8, 16), (3, 9)]


def simulated(name: str, ranks: int, microbatches: int, stages_per_rank: int = 1) -> Simulated:
    """Stages that share out a model whose F, I and W take 12 s on a rank, exactly, and whose activations 12 bytes."""
    stage = StageCosts(forward_s=12 / stages_per_rank, input_s=12 / stages_per_rank, weight_s=12 / stages_per_rank,
                       backward_s=24 / stages_per_rank, activation_bytes=12 // stages_per_rank)  # fmt: skip
    schedule = make_schedule(name, Shape(ranks, microbatches, stages_per_rank))
    return simulate(schedule, [stage] * schedule.stages)


@pytest.mark.parametrize(("ranks", "microbatches"), SHAPES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_one_stage_per_rank(name: str, ranks: int, microbatches: int):
    found = simulated(name, ranks, microbatches)
    assert found.step_s == (microbatches + ranks - 1) * 36
    assert found.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@pytest.mark.parametrize(("ranks", "microbatches"), SHAPES)
@pytest.mark.parametrize("stages_per_rank", [2, 3, 4])
@pytest.mark.parametrize("name", ["gpipe", "interleaved"])
def test_several_stages_per_rank_divide_the_bubble(name: str, ranks: int, microbatches: int, stages_per_rank: int):
    found = simulated(name, ranks, microbatches, stages_per_rank)
    assert found.idle_s == ((ranks - 1) * 36 / stages_per_rank,) * ranks
    bubble = (ranks - 1) / (stages_per_rank * microbatches + ranks - 1)
    assert found.bubble == pytest.approx(bubble)


@pytest.mark.parametrize(("ranks", "microbatches"), SHAPES)
def test_zb1p_idles_a_third_of_the_time_with_the_same_activations(ranks: int, microbatches: int):
    plain, found = simulated("1f1b", ranks, microbatches), simulated("zb1p", ranks, microbatches)
    assert [3 * idle_s for idle_s in found.idle_s] == list(plain.idle_s)
    assert max(found.activation_bytes) == max(plain.activation_bytes)


@pytest.mark.parametrize(("ranks", "microbatches", "bubble"), [(8, 16, 0.07), (4, 16, 0.031), (8, 64, 0.02)])
def test_zbv_has_the_smallest_bubble_with_the_same_activations(ranks: int, microbatches: int, bubble: float):
    """The rank of the middle stages begins when a microbatch comes by: that is all that anybody idles."""
    plain, found = simulated("1f1b", ranks, microbatches), simulated("zbv", ranks, microbatches, 2)
    assert found.idle_s == ((ranks - 1) * 6,) * ranks
    assert found.bubble == pytest.approx((ranks - 1) / (6 * microbatches + ranks - 1)) and found.bubble <= bubble
    assert max(found.activation_bytes) == max(plain.activation_bytes)


def test_activations_are_held_from_the_forward_to_the_end_of_the_backward():
    assert simulated("gpipe", 4, 8).in_flight == (8, 8, 8, 8)
    assert simulated("1f1b", 4, 8).in_flight == (4, 3, 2, 1)
    assert simulated("zb1p", 4, 8).in_flight == (4, 4, 4, 4), "weights' gradients need them as well"
    assert simulated("interleaved", 4, 8, 2).in_flight == (11, 9, 7, 5)
    assert simulated("zbv", 4, 8, 2).in_flight == (8, 8, 8, 8), "of half as large stages"


def test_activations_are_weighted_by_stage():
    schedule = make_schedule("1f1b", Shape(3, 4))
    stages = [StageCosts(1, 1, 1, 2, activation_bytes=held) for held in (10, 200, 3000)]
    assert simulate(schedule, stages).activation_bytes == (30, 400, 3000)


BY_HAND = Schedule.parse("""\
by-hand stages=3 microbatches=2
rank 0: F0.0 F0.1 F2.0 I2.0 F2.1 B2.1 W2.0 B0.0 B0.1
rank 1: F1.0 F1.1 B1.0 B1.1""")


def test_every_action_by_hand():
    """Messages between stages 0 and 1 take 2 s, between 1 and 2 5 s; the second waits for the first to have gone."""
    stages = [
        StageCosts(forward_s=1, input_s=2, weight_s=3, backward_s=4, message_s=2),
        StageCosts(forward_s=10, input_s=20, weight_s=30, backward_s=40, message_s=5),
        StageCosts(forward_s=100, input_s=200, weight_s=300, backward_s=400, message_s=1000),
    ]
    found = simulate(BY_HAND, stages)
    expected = [
        (0, "F0.0", 0, 1), (0, "F0.1", 1, 2), (1, "F1.0", 3, 13), (1, "F1.1", 13, 23), (0, "F2.0", 18, 118),
        (0, "I2.0", 118, 318), (0, "F2.1", 318, 418), (1, "B1.0", 323, 363), (0, "B2.1", 418, 818),
        (0, "W2.0", 818, 1118), (1, "B1.1", 823, 863), (0, "B0.0", 1118, 1122), (0, "B0.1", 1122, 1126),
    ]  # fmt: skip
    assert list(found.events) == [Event(rank, Action.parse(name), begin, end) for rank, name, begin, end in expected]
    sent = [(str(m.action), str(m.reader), m.begin_s, m.end_s) for m in found.messages]
    assert sent[:3] == [("F0.0", "F1.0", 1, 3), ("F0.1", "F1.1", 3, 5), ("F1.0", "F2.0", 13, 18)]
    assert len(sent) == 8
    assert found.step_s == 1126 and found.idle_s == (16, 1026) and found.bubble == pytest.approx(1042 / 2252)


def test_a_loss_that_is_read_stops_ranks_at_their_turns():
    """Rank 0 could do B0.0 from 4 s on, and has the loss, which is there at 2 s, at 9 s."""
    schedule = make_schedule("gpipe", Shape(ranks=2, microbatches=1))
    stages = [StageCosts(1, 1, 1, 2), StageCosts(1, 1, 1, 2, message_s=7)]
    plain, waiting = simulate(schedule, stages), simulate(schedule, stages, loss_awaited=True)
    backward = Action(stage=0, microbatch=0, kind="B")
    assert [event for event in plain.events if event.action == backward] == [Event(0, backward, 4, 6)]
    assert [event for event in waiting.events if event.action == backward] == [Event(0, backward, 9, 11)]


@pytest.mark.parametrize(("ranks", "microbatches"), SHAPES)
@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_lost_by_a_loss_that_is_read(name: str, ranks: int, microbatches: int):
    stages_per_rank = 2 if name in ("interleaved", "zbv") else 1
    plain = simulated(name, ranks, microbatches, stages_per_rank)
    assert simulate(plain.schedule, plain.costs, loss_awaited=True).step_s == plain.step_s


@given(schedules)
def test_ranks_do_one_thing_at_a_time_and_wait_for_what_they_need(schedule: Schedule):
    found = simulate(schedule, [StageCosts(1 + stage, 2, 3, 4, message_s=0.5) for stage in range(schedule.stages)])
    events = {event.action: event for event in found.events}
    for rank, actions in enumerate(schedule.ranks):
        mine = [event for event in found.events if event.rank == rank]
        assert [event.action for event in mine] == list(actions)
        assert all(one.end_s <= next_one.begin_s for one, next_one in pairwise(mine))
    for action, event in events.items():
        for need in schedule.needs(action):
            message_s = 0.5 if events[need].rank != event.rank else 0.0
            assert events[need].end_s + message_s <= event.begin_s


def test_what_cannot_run_is_not_simulated():
    schedule = make_schedule("1f1b", Shape(2, 2))
    with pytest.raises(ArgumentError, match="costs of 3 stages were given for the schedule 1f1b, which has 2"):
        simulate(schedule, [StageCosts(1, 1, 1, 2)] * 3)
    broken = Schedule.parse(str(schedule).replace("F0.0 F0.1", "F0.1"))
    with pytest.raises(ArgumentError, match=r"the schedule 1f1b cannot run: rank 0: no F0\.0"):
        simulate(broken, [StageCosts(1, 1, 1, 2)] * 2)


@pytest.mark.parametrize(("field", "value"), [("forward_s", -1.0), ("weight_s", math.nan), ("message_s", math.inf)])
def test_costs_are_finite_and_not_negative(field: str, value: float):
    with pytest.raises(ArgumentError, match=f"{field}={value}; expected 0 or more"):
        replace(StageCosts(1, 1, 1, 2), **{field: value})
