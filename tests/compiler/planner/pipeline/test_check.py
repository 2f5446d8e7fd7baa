"""What is wrong with a schedule is found before it runs, as in the graph of who waits for whom, and told."""

from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest
from geminifx.compiler.planner.pipeline.check import check, check_schedule
from geminifx.runtime.isa.errors import ArgumentError
from geminifx.runtime.isa.schedule import Action, Schedule
from hypothesis import given
from hypothesis import strategies as st
from schedules import schedules

TWO_RANKS = """\
by-hand stages=2 microbatches=2
rank 0: F0.0 F0.1 B0.0 B0.1
rank 1: F1.0 I1.0 F1.1 B1.1 W1.0"""


def can_run(schedule: Schedule) -> bool:
    """The graph of all that an action waits for, and of the turns, at which every rank waits for all, has no cycle."""
    before: dict[object, set[object]] = {}
    for rank, actions in enumerate(schedule.ranks):
        turn = schedule.turn(rank)
        for i, action in enumerate(actions):
            before[action] = {*schedule.needs(action), *actions[max(i - 1, 0) : i], *(["turn"] if i >= turn else [])}
        before.setdefault("turn", set()).update(actions[:turn])
    try:
        TopologicalSorter(before).prepare()
    except CycleError:
        return False
    return True


def with_rank(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> Schedule:
    return replace(schedule, ranks=(*schedule.ranks[:rank], actions, *schedule.ranks[rank + 1 :]))


@given(schedules, st.data())
def test_two_swapped_actions_are_found_where_they_matter(schedule: Schedule, data: st.DataObject):
    rank = data.draw(st.integers(0, len(schedule.ranks) - 1))
    actions = list(schedule.ranks[rank])
    i, j = (data.draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    actions[i], actions[j] = actions[j], actions[i]
    swapped = with_rank(schedule, rank, tuple(actions))
    assert (check(swapped) is None) == can_run(swapped)


@given(schedules, st.data())
def test_an_action_that_is_left_out_is_found(schedule: Schedule, data: st.DataObject):
    rank = data.draw(st.integers(0, len(schedule.ranks) - 1))
    actions = schedule.ranks[rank]
    i = data.draw(st.integers(0, len(actions) - 1))
    violation = check(with_rank(schedule, rank, actions[:i] + actions[i + 1 :]))
    assert violation is not None
    assert violation.found == f"no {actions[i]}" and violation.where in (f"rank {rank}", "no rank")


@given(schedules, st.data())
def test_an_action_that_stands_twice_is_found(schedule: Schedule, data: st.DataObject):
    rank = data.draw(st.integers(0, len(schedule.ranks) - 1))
    actions = schedule.ranks[rank]
    i, j = data.draw(st.integers(0, len(actions) - 1)), data.draw(st.integers(0, len(actions)))
    violation = check(with_rank(schedule, rank, (*actions[:j], actions[i], *actions[j:])))
    assert str(violation) == f"rank {rank} at {actions[i]}: already done; expected each action once"


@given(schedules.filter(lambda schedule: len(schedule.ranks) > 1), st.data())
def test_an_action_on_another_rank_is_found(schedule: Schedule, data: st.DataObject):
    rank = data.draw(st.integers(0, len(schedule.ranks) - 1))
    other = (rank + 1) % len(schedule.ranks)
    moved, *rest = schedule.ranks[rank]
    there = with_rank(with_rank(schedule, rank, tuple(rest)), other, (*schedule.ranks[other], moved))
    violation = check(there)
    assert violation is not None and f"stage {moved.stage} is on rank" in violation.found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages=2", "stages=1", "rank 1 at F1.0: stage 1; expected stages 0 to 0"),
        ("microbatches=2", "microbatches=1", "rank 0 at F0.1: microbatch 1; expected microbatches 0 to 0"),
        ("microbatches=2", "microbatches=0", "microbatches: 0 of them; expected 1 or more"),
        ("stages=2", "stages=3", "no rank: no F2.0; expected F once, and B, or I and W, once"),
        ("W1.0", "W1.0\nrank 2:", "rank 2: nothing to do; expected a stage on every rank, or fewer ranks"),
        ("F1.0 I1.0", "I1.0", "rank 1: no F1.0; expected F once"),
        ("B1.1 W1.0", "B1.1", "rank 1: no W1.0; expected F once, and B, or I and W, once"),
        ("B1.1 W1.0", "B1.1 W1.0 W1.1",
         "rank 1 at W1.1: both a whole backward (B) and a part of it (I or W); expected either B, or I"),
        ("I1.0", "W1.0 I1.0", "rank 1 at W1.0: already done; expected each action once"),
        ("B0.1", "B0.1 F1.0",
         "rank 1 at F1.0: stage 1 is on rank 0 as well; expected all actions of a stage on one rank"),
        ("F0.0 F0.1 B0.0 B0.1", "F0.0 B0.0 B0.1 F0.1",
         "rank 0 at B0.1: B0.1 waits for F0.1 of rank 0; expected every action after those that it waits for"),
    ],
)  # fmt: skip
def test_a_violation_names_rank_and_action(old: str, new: str, message: str):
    assert check(Schedule.parse(TWO_RANKS)) is None
    violation = check(Schedule.parse(TWO_RANKS.replace(old, new)))
    assert str(violation).startswith(message)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("F0.0 F0.1 B0.0 W0.1", "F1.0 B1.0 F1.1 B1.1 I0.1",
         "rank 0 at W0.1: its first part is on rank 1; expected both parts on one rank"),
        ("F0.0 F1.0 B1.0 B0.0 F0.1", "F1.1 B1.1 B0.1",
         "rank 0 at F0.1: it comes after B1.0, which completes the rank's gradients of a stage; expected all "
         "forwards of a rank before its last backwards"),
    ],
)  # fmt: skip
def test_where_any_rank_may_run_an_action_some_need_more(first: str, second: str, message: str):
    schedule = f"by-hand stages=2 microbatches=2 weights=host\nrank 0: {first}\nrank 1: {second}"
    assert str(check(Schedule.parse(schedule))) == message


def test_ranks_that_wait_for_one_another_are_all_named():
    schedule = Schedule.parse("""\
    by-hand stages=3 microbatches=2
    rank 0: F0.0 B0.0 F0.1 B0.1
    rank 1: F1.0 F1.1 B1.0 B1.1
    rank 2: F2.0 B2.0 F2.1 B2.1""")
    assert str(check(schedule)) == (
        "rank 0 at B0.0: B0.0 waits for B1.0 of rank 1, F1.1 waits for F0.1 of rank 0; "
        "expected every action after those that it waits for"
    )


def test_no_turn_stands_in_front_of_what_another_rank_waits_for_before_its_own():
    """Rank 0 has no loss to hand out before rank 1 has gone on from its last forward."""
    schedule = Schedule.parse("""\
    by-hand stages=3 microbatches=2
    rank 0: F0.0 F0.1 F2.0 B2.0 B0.0 F2.1 B2.1 B0.1
    rank 1: F1.0 F1.1 B1.0 B1.1""")
    assert can_run(schedule) and check(schedule) is None
    assert [schedule.turn(rank) for rank in range(2)] == [6, 3]


def test_a_schedule_that_cannot_run_is_refused():
    check_schedule(Schedule.parse(TWO_RANKS))
    with pytest.raises(ArgumentError, match=r"the schedule by-hand cannot run: rank 1: no W1\.0; expected F once"):
        check_schedule(Schedule.parse(TWO_RANKS.replace(" W1.0", "")))
