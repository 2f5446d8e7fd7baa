"""partition: the turn, weights made ready again behind it, buffers written in front of it."""

from dataclasses import replace

import pytest
import torch
from geminifx.passes.partition import partition
from geminifx.passes.program.manager import run_passes
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


def test_a_gradient_comes_in_as_the_step_was_traced_for():
    """Of an output that is transposed, by a tangent that is not: torch 2.11 traces all tangents as contiguous."""
    program = parse_program(
        'def training(x: "f32[2, 3] | input:0", b: "f32[2, 3] | parameter:b", tangent: "f32[3, 2] | tangent:0"):\n'
        "    # forward\n"
        '    y: "f32[2, 3]" = aten.add.Tensor(x, b)\n'
        '    out: "f32[3, 2]{1, 3}" = aten.t.default(y)\n'
        "    # backward\n"
        '    db: "f32[2, 3]{1, 2}" = aten.t.default(tangent)\n'
        '    return {"output:0": out, "gradient:b": db}\n'
    )
    run_passes(program, Plan(), (replace(partition, requires=()),))  # which infers all types again
    (turn,) = program.calls(TURN)
    (clone,) = program.calls(torch.ops.aten.clone.default)
    assert clone.args[0].args == (turn, 0) and note(clone).phase == "backward"


def test_evaluation_keeps_its_outputs(evaluation):
    program, plan = evaluation
    outputs = list(program.results_of("output"))
    partition.rewrite(program, plan)
    assert program.calls(TURN) == [] and list(program.results) == [f"output:{i}" for i in outputs]
