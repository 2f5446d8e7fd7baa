"""partition: the turn, weights made ready again behind it, buffers written in front of it."""

import pytest
from geminifx.passes.partition import partition
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import note
from geminifx.passes.program.text import parse_program
from geminifx.runtime.isa.instructions import TURN


@pytest.mark.parametrize("case", ["turn", "buffers", "buffers_through_views", "evaluation"])
def test_before_and_after(golden, case):
    golden(case, partition, Plan())


def test_a_gradient_that_is_the_tangent_itself():
    program = parse_program(
        'def training(x: "f32[4] | input:0", b: "f32[4] | parameter:b", tangent: "f32[4] | tangent:0"):\n'
        "    # forward\n"
        '    y: "f32[4]" = aten.add.Tensor(x, b)\n'
        '    return {"output:0": y, "gradient:b": tangent}\n'
    )
    partition.rewrite(program, Plan())
    (turn,) = program.calls(TURN)
    gradient = program.results["gradient:b"]
    assert gradient.args == (turn, 0) and note(gradient).phase == "backward"
    assert program.inputs("tangent") == {}


def test_evaluation_keeps_its_outputs(evaluation):
    program, plan = evaluation
    outputs = list(program.results_of("output"))
    partition.rewrite(program, plan)
    assert program.calls(TURN) == [] and list(program.results) == [f"output:{i}" for i in outputs]
