"""post_receives: messages travel beside compute, and ranks find what they found before."""

import re

import pytest
from geminifx.compiler.planner.pipeline.round_robin import EVEN, round_robin
from geminifx.compiler.planner.pipeline.schedules import Shape, make_schedule
from geminifx.passes.partition import partition
from geminifx.passes.post_receives import post_receives
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import annotate, note
from geminifx.passes.program.verify import posted, turned, verify
from geminifx.runtime.isa.errors import VerificationError
from geminifx.runtime.isa.instructions import FINISH_RECEIVE, START_RECEIVE
from pipelines import PASSES, step_of
from zoo import Case, opt

DEEP = Case("opt, four blocks", lambda: opt(num_hidden_layers=4))


def test_before_and_after(golden):
    golden("one_action_ahead", post_receives, Plan(schedule=make_schedule("1f1b", Shape(3, 2)), line=1))


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p"])
def test_what_an_action_reads_is_awaited_from_the_one_in_front(name):
    """In each phase, but for what its first action reads, and for what is read behind the last one."""
    schedule = make_schedule(name, Shape(4, 8))
    for plan in step_of(DEEP, 8).plans(schedule):
        program = step_of(DEEP, 8).lowered(plan)
        order = program.positions()
        begins = {}
        for node in program.computes:
            begins.setdefault((note(node).phase, note(node).action), order[node])
        places = sorted(begins.values())
        starts = {source: [] for source in range(4)}
        for finish in program.calls(FINISH_RECEIVE):
            start, begin = finish.args[0], begins[note(finish).phase, note(finish).action]
            first = min(place for (phase, _), place in begins.items() if phase == note(finish).phase)
            if begin != first and note(finish).action:
                assert order[start] < begin, "it starts ahead of the action that reads it"
                assert places.index(begin) - sum(place <= order[start] for place in places) <= 0, "by one action"
            starts[start.args[3]].append(order[start])
        assert all(found == sorted(found) for found in starts.values()), "in the order in which they were sent"
        assert program.calls(START_RECEIVE)


def test_behind_the_last_action_one_message_at_a_time_is_awaited():
    """They are parts of gradients, which are long: each but the first starts before the one in front is awaited."""
    step = step_of(Case("opt of eight blocks", lambda: opt(num_hidden_layers=8)), 4)
    longest = 0
    for plan in step.plans(round_robin([EVEN] * 8, 4, 4)):
        nodes = list(step.lowered(plan).computes)
        last = max(i for i, node in enumerate(nodes) if note(node).action.startswith("B"))
        found = [node for node in nodes[last + 1 :] if node.target in (START_RECEIVE, FINISH_RECEIVE)]
        kinds = "".join("s" if node.target is START_RECEIVE else "f" for node in found)
        assert re.fullmatch("((sf)*f)?", kinds), kinds
        longest = max(longest, len(kinds))
    assert longest > 2


def test_a_receive_that_is_not_waited_for_in_its_phase_is_told():
    plan = step_of(DEEP, 8).plans(make_schedule("1f1b", Shape(4, 8)))[1]
    program = step_of(DEEP, 8).lowered(plan)
    verify(program, plan, (turned, posted), "post_receives")
    late = next(node for node in program.calls(FINISH_RECEIVE) if note(node).phase == "backward")
    next(node for node in program.computes if note(node).phase == "forward").prepend(late.args[0])
    annotate(late.args[0], phase="forward")
    with pytest.raises(VerificationError, match=r"waits for start_receive\w* of the other phase"):
        verify(program, plan, (turned, posted), "someone")


def test_a_receive_in_one_piece_is_told():
    step = step_of(DEEP, 8)
    plan = step.plans(make_schedule("1f1b", Shape(4, 8)))[1]
    program = step.program.copy()
    for each in PASSES[: PASSES.index(partition) + 1]:
        each.rewrite(program, plan)
    with pytest.raises(VerificationError, match="a receive in one piece"):
        verify(program, plan, (posted,), "partition")
