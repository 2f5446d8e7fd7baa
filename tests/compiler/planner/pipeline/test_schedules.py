"""Every kind of schedule, of every shape it fits: it can run, in the order of microbatches; others are refused."""

import pytest
from geminifx.compiler.planner.pipeline.check import check
from geminifx.compiler.planner.pipeline.schedules import KINDS, Shape, make_schedule
from geminifx.runtime.isa.errors import ArgumentError
from geminifx.runtime.isa.schedule import Schedule
from hypothesis import given
from schedules import schedules


@given(schedules)
def test_every_schedule_can_run(schedule: Schedule):
    assert check(schedule) is None


@given(schedules)
def test_a_stage_takes_microbatches_in_their_order(schedule: Schedule):
    """So its gradients add up as they do without stages."""
    for actions in schedule.ranks:
        for stage in range(schedule.stages):
            for kinds in ("F", "BI", "BW"):
                taken = [action.microbatch for action in actions if action.stage == stage and action.kind in kinds]
                assert taken == sorted(taken)


@given(schedules)
def test_text_parses_back(schedule: Schedule):
    assert Schedule.parse(str(schedule)) == schedule


@given(schedules)
def test_stages_lie_round_about_the_ranks_or_as_a_v(schedule: Schedule):
    ranks = len(schedule.ranks)
    for stage in range(schedule.stages):
        folded = 2 * ranks - 1 - stage if stage >= ranks else stage
        assert schedule.rank_of(stage) == (folded if schedule.name == "zbv" else stage % ranks)


def test_kinds_differ():
    """Two ranks, three microbatches, by hand."""
    assert str(make_schedule("gpipe", Shape(2, 3))).splitlines()[1:] == [
        "rank 0: F0.0 F0.1 F0.2 B0.0 B0.1 B0.2",
        "rank 1: F1.0 F1.1 F1.2 B1.0 B1.1 B1.2",
    ]
    assert str(make_schedule("1f1b", Shape(2, 3))).splitlines()[1:] == [
        "rank 0: F0.0 F0.1 B0.0 F0.2 B0.1 B0.2",
        "rank 1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2",
    ]
    assert str(make_schedule("zb1p", Shape(2, 3))).splitlines()[1:] == [
        "rank 0: F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2",
        "rank 1: F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2",
    ]


def test_several_stages_of_a_rank_in_gpipe_are_run_one_after_the_other():
    assert str(make_schedule("gpipe", Shape(1, 2, stages_per_rank=2))).splitlines()[1:] == [
        "rank 0: F0.0 F0.1 F1.0 F1.1 B1.0 B1.1 B0.0 B0.1",
    ]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("dualpipe", Shape(2, 4), "no schedule 'dualpipe'; expected one of gpipe, 1f1b, interleaved, zb1p, zbv"),
        ("gpipe", Shape(0, 4), "of 0 ranks; expected 1 or more"),
        ("gpipe", Shape(2, 0), "of 0 microbatches; expected 1 or more"),
        ("1f1b", Shape(2, 4, 0), "of 0 stages per rank; expected 1 or more"),
        ("1f1b", Shape(2, 4, 2), "it has 1 stage per rank, not 2; interleaved, zb1p and gpipe have several"),
        ("interleaved", Shape(2, 4, 1), "it has 2 stages per rank or more, not 1; 1f1b has one"),
        (
            "interleaved",
            Shape(4, 9, 2),
            "9 microbatches on 4 ranks make 2 rounds of unequal size; expected 8 or 10, or any multiple",
        ),
        ("interleaved", Shape(4, 3, 2), "3 microbatches are too few for 4 ranks; expected 4 or more"),
        ("zb1p", Shape(8, 2, 3), "2 microbatches are too few for 8 ranks; expected 8 or more"),
        (
            "zb1p",
            Shape(4, 13),
            "13 microbatches on 4 ranks make 3 rounds of unequal size; expected 12 or 15, or any multiple of 4",
        ),
        ("zbv", Shape(4, 8, 1), "it has 2 stages per rank, not 1; zb1p has any number"),
        ("zbv", Shape(4, 8, 3), "it has 2 stages per rank, not 3"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(name: str, shape: Shape, message: str):
    with pytest.raises(ArgumentError, match=message):
        make_schedule(name, shape)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_the_numbers_of_microbatches_that_a_refusal_names_do_fit(ranks: int):
    for microbatches in range(ranks, 60):
        misfit = KINDS["zb1p"].misfit(Shape(ranks, microbatches))
        named = [int(word) for word in misfit.partition("expected ")[2].replace(",", "").split() if word.isdigit()]
        assert all(not KINDS["zb1p"].misfit(Shape(ranks, count)) for count in named)
        assert not misfit or named[0] < microbatches < named[1]


def test_a_table_of_torch_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch):
    """As that of its 1F1B is, whose last rank counts microbatches from 1."""
    broken = [[(0, 0, "F"), (0, 0, "B")], [(1, 1, "F"), (1, 0, "B")]]
    monkeypatch.setattr("geminifx.compiler.planner.pipeline.schedules.pipeline_table", lambda *_: broken)
    with pytest.raises(
        ArgumentError, match=r"zb1p cannot run: rank 1 at F1\.1: microbatch 1; expected microbatches 0 to"
    ):
        make_schedule("zb1p", Shape(ranks=1, microbatches=1, stages_per_rank=2))
