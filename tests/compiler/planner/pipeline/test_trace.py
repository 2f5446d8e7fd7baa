"""The trace of a simulated step holds all that was simulated, as Chrome's format has it."""

import json

import pytest
from geminifx.compiler.planner.pipeline.schedules import Shape, make_schedule
from geminifx.compiler.planner.pipeline.simulate import StageCosts, simulate
from geminifx.compiler.planner.pipeline.trace import chrome_trace


def test_a_trace_has_a_slice_for_each_event_and_an_arrow_for_each_message():
    schedule = make_schedule("zbv", Shape(ranks=2, microbatches=3, stages_per_rank=2))
    simulated = simulate(schedule, [StageCosts(0.001, 0.002, 0.003, 0.005, message_s=0.0005)] * 4)
    events = json.loads(chrome_trace(simulated))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "rank 0: stage 0, 3", 1: "rank 1: stage 1, 2"}
    slices = [event for event in events if event["ph"] == "X"]
    assert {(one["tid"], one["name"]) for one in slices} == {(e.rank, str(e.action)) for e in simulated.events}
    assert slices[0] == {
        "ph": "X", "name": "F0.0", "cat": "forward", "pid": 0, "tid": 0, "ts": 0.0, "dur": 1000.0,
        "args": {"stage": 0, "microbatch": 0},
    }  # fmt: skip
    assert max(one["ts"] + one["dur"] for one in slices) == simulated.step_s * 1e6
    begins, ends = ({event["id"]: event for event in events if event["ph"] == phase} for phase in "sf")
    assert begins.keys() == ends.keys() and len(begins) == len(simulated.messages) == 12
    for number, begin in begins.items():
        assert begin["tid"] != ends[number]["tid"] and begin["ts"] < ends[number]["ts"]
        assert begin["args"]["us"] == pytest.approx(500)
