"""Round-robin schedules, whose stages have no rank of their own: they can run, on the clock, and with small bubbles."""

import geminifx
import pytest
from geminifx.compiler.planner.pipeline.check import check
from geminifx.compiler.planner.pipeline.round_robin import round_robin
from geminifx.compiler.planner.pipeline.simulate import StageCosts, simulate
from geminifx.compiler.planner.world.search import weigh
from geminifx.compiler.planner.world.ways import Way
from geminifx.compiler.rates.clusters import CLUSTERS
from geminifx.runtime.isa.errors import ArgumentError
from geminifx.runtime.isa.schedule import Schedule
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from worlds import measured, world_of

LAYER, HEAD = StageCosts(1.0, 1.0, 1.0, 3.0, activation_bytes=5), StageCosts(3.4, 3.4, 3.4, 6.8, activation_bytes=7)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_every_one_can_run(stages: int, ranks: int, microbatches: int, with_head: bool) -> None:
    """Where there is something to do for every rank."""
    costs = [LAYER] * (stages - 1) + [HEAD if with_head else LAYER]
    if ranks > 2 * (stages - 1) + microbatches:
        with pytest.raises(ArgumentError, match="slots, fewer than the"):
            round_robin(costs, ranks, microbatches)
        return
    schedule = round_robin(costs, ranks, microbatches)
    assert check(schedule) is None
    assert Schedule.parse(str(schedule)) == schedule


def test_ranks_take_turns() -> None:
    """Three forwards take as long as one backward; the last stage's backward follows at once. Whoever is free first
    takes the next slot."""
    assert str(round_robin([LAYER] * 4, 2, 2)).splitlines() == [
        "roundrobin stages=4 microbatches=2 weights=host",
        "rank 0: F0.0 F1.0 F2.0 F0.1 F1.1 F2.1 B2.0 B2.1 B0.0 B0.1",
        "rank 1: F3.0 B3.0 F3.1 B3.1 B1.0 B1.1",
    ]


def test_where_ranks_have_microbatches_enough_they_wait_at_the_beginning_and_the_end_alone() -> None:
    costs = [LAYER] * 47 + [StageCosts(1.0, 1.0, 1.0, 2.0)]  # nothing of the last one is computed again
    for microbatches in (8, 16, 32):
        run = simulate(round_robin(costs, 8, microbatches), costs)
        slots = 48 * 4 / 3 / 8 * microbatches  # of three seconds, by rank
        assert run.bubble <= 1.25 * 7 / (slots + 7)


def test_a_head_that_takes_long_is_divided_by_microbatches() -> None:
    costs = [LAYER] * 31 + [HEAD]
    schedule = round_robin(costs, 8, 16)
    heads = {schedule.runner(action) for actions in schedule.ranks for action in actions if action.stage == 31}
    assert len(heads) > 1
    assert simulate(schedule, costs).bubble <= 0.15


def test_a_backward_tells_the_next_before_it_computes_gradients_of_weights() -> None:
    """One third of it passes behind its message, and hides it; a stage with a rank of its own has no such order."""
    layer = StageCosts(1.0, 1.0, 1.0, 3.0, message_s=0.5)
    text = "{} stages=2 microbatches=1{}\nrank 0: F0.0 B0.0\nrank 1: F1.0 B1.0"
    for weights, message, step_s in ((" weights=host", (4.5, 5.0), 8.0), ("", (5.5, 6.0), 9.0)):
        run = simulate(Schedule.parse(text.format("two", weights)), [layer] * 2)
        assert [(sent.begin_s, sent.end_s) for sent in run.messages] == [(1.0, 1.5), message]
        assert run.step_s == step_s


def test_ranks_hold_what_they_work_on() -> None:
    run = simulate(round_robin([LAYER] * 31 + [HEAD], 8, 16), [LAYER] * 31 + [HEAD])
    assert set(run.in_flight) == {1}
    assert set(run.activation_bytes) <= {5, 7}


def test_ranks_receive_sums_of_those_that_run_backwards_of_the_same_stage() -> None:
    text = "two stages=2 microbatches=2 weights=host\nrank 0: F0.0 F0.1 F1.1 B1.1\nrank 1: F1.0 B1.0 B0.0 B0.1"
    assert Schedule.parse(text).sums_received == [[1, 1], [0, 1]]
    assert (
        Schedule.parse("one stages=2 microbatches=1\nrank 0: F0.0 B0.0\nrank 1: F1.0 B1.0").sums_received
        == [[0, 0]] * 2
    )


def test_its_stages_have_no_rank() -> None:
    schedule = round_robin([LAYER] * 4, 2, 2)
    with pytest.raises(ValueError, match="no stage of the schedule roundrobin belongs to one rank"):
        schedule.rank_of(0)


def test_a_loss_that_is_awaited_delays_the_first_backward() -> None:
    costs = [LAYER] * 31 + [HEAD]
    schedule = round_robin(costs, 4, 8)
    assert simulate(schedule, costs, loss_awaited=True).step_s >= simulate(schedule, costs).step_s


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_nothing_makes_no_schedule(counts: tuple[int, int, int]) -> None:
    stages, ranks, microbatches = counts
    with pytest.raises(ArgumentError, match="expected 1 or more"):
        round_robin([LAYER] * stages, ranks, microbatches)


@pytest.mark.parametrize("schedule", ["roundrobin", round_robin([LAYER] * 2, 2, 2)], ids=["by name", "as data"])
def test_compile_refuses_it_for_sharded_tensors(schedule: str | Schedule) -> None:
    with pytest.raises(ArgumentError, match="does not support sharded tensors"):
        geminifx.compile(nn.Linear(2, 2), parallel={"pipeline": 2, "tensor": "1d:2"}, schedule=schedule)


@pytest.mark.parametrize(("microbatches", "most"), [(8, 0.143), (16, 0.1)])
def test_llama_8b_on_eight_devices_on_pcie(microbatches: int, most: float) -> None:
    """Weights, states and what backwards read are on the hosts. RoundPipe publishes 14.3 % for 8 microbatches."""
    world = world_of(CLUSTERS["8-pcie"], 24 * 10**9, per_device=2)
    model = measured("llama-8b")
    way = Way(pipeline=8, microbatches=microbatches, schedule="roundrobin", stages_per_rank=len(model.parts))
    found = weigh(model, world, way, ("host",))
    assert found.bubble <= most
    parts = sum(map(sum, found.simulated.schedule.sums_received)) if found.simulated else 0
    assert parts >= len(model.parts) - 1 and found.exchange_s > 1.0, "sums of gradients count as communication"
    fixed = weigh(model, world, Way(pipeline=8, microbatches=microbatches, schedule="1f1b"), ("host",))
    assert found.step_s < fixed.step_s
