"""Schedules as data: what they say of themselves, and their text."""

import pytest
from geminifx.runtime.isa.schedule import Action, Schedule
from hypothesis import given
from hypothesis import strategies as st

TEXT = """\
hand-made stages=3 microbatches=2
rank 0: F0.0 F0.1 F2.0 I2.0 F2.1 W2.0 B2.1 B0.0 B0.1
rank 1: F1.0 F1.1 B1.0 B1.1"""

actions = st.builds(Action, st.integers(0, 20), st.integers(0, 200), st.sampled_from(["F", "B", "I", "W"]))
schedules = st.builds(
    Schedule,
    name=st.from_regex(r"\A\S+\Z"),
    stages=st.integers(0, 20),
    microbatches=st.integers(0, 200),
    ranks=st.lists(st.lists(actions, max_size=6).map(tuple), max_size=4).map(tuple),
)


@given(schedules)
def test_text_parses_back(schedule: Schedule):
    assert Schedule.parse(str(schedule)) == schedule


def test_text_is_a_line_for_each_rank():
    schedule = Schedule.parse(TEXT)
    assert str(schedule) == TEXT
    assert schedule.ranks[1][0] == Action(stage=1, microbatch=0, kind="F")
    assert len(schedule.ranks) == 2


def test_what_a_schedule_says_of_its_ranks():
    schedule = Schedule.parse(TEXT)
    assert [schedule.rank_of(stage) for stage in range(3)] == [0, 1, 0]
    assert [schedule.stages_of(rank) for rank in range(2)] == [(0, 2), (1,)]
    assert [schedule.turn(rank) for rank in range(2)] == [6, 3]
    assert schedule.splits_backward
    with pytest.raises(ValueError, match="no rank of the schedule hand-made runs stage 3 of 3"):
        schedule.rank_of(3)


def test_what_an_action_waits_for():
    schedule = Schedule.parse(TEXT)
    waits = {"F0.0": "", "F1.1": "F0.1", "B1.0": "F1.0 I2.0", "B1.1": "F1.1 B2.1", "I2.0": "F2.0", "W2.0": "I2.0"}
    for action, needed in waits.items():
        assert " ".join(map(str, schedule.needs(Action.parse(action)))) == needed


def test_what_waits_for_an_action():
    schedule = Schedule.parse(TEXT)
    readers = {"F0.0": "F1.0", "F2.0": None, "I2.0": "B1.0", "W2.0": None, "B2.1": "B1.1", "B0.0": None}
    for action, reader in readers.items():
        assert schedule.reader(Action.parse(action)) == (reader and Action.parse(reader))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: nothing, expected a header such as"),
        ("1f1b stages=2", "line 1: '1f1b stages=2', expected a header"),
        (TEXT.replace("rank 1", "rank 2"), "line 3: 'rank 2: .*', expected 'rank 1:'"),
        (TEXT.replace("F1.0", "G1.0"), "line 3: 'G1.0' is not an action; expected F, B, I or W"),
        (TEXT.replace("F1.0", "F1"), "line 3: 'F1' is not an action"),
        (TEXT.replace("F1.0", "F1.0,"), "line 3: 'F1.0,' is not an action"),
    ],
)
def test_what_is_no_schedule_is_refused_by_its_line(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)


@pytest.mark.parametrize("name", ["", "two words", " 1f1b", "a\nb"])
def test_a_name_that_would_not_parse_back_is_refused(name: str):
    with pytest.raises(ValueError, match="expected one word"):
        Schedule(name, 1, 1, ())


def test_a_stage_returns_whose_backwards_are_all_on_the_ranks_of_their_forwards():
    schedule = Schedule.parse("""mine stages=3 microbatches=2 weights=host
        rank 0: F0.0 F0.1 F1.1 F2.1 I2.1 W2.1 B1.0 B1.1
        rank 1: F1.0 F2.0 B2.0 B0.0 B0.1""")
    assert [schedule.returns(stage) for stage in range(3)] == [False, False, True]
