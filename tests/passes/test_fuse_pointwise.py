"""fuse_pointwise: what lies between products is one function, and the same is computed."""

import pytest
import torch
from geminifx.passes.fuse_pointwise import fuse_pointwise
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.request import Request
from geminifx.passes.program.text import parse_program, print_program

FUSED = Plan(request=Request(kernels="fused"))


@pytest.mark.parametrize("case", ["norm", "what_ends_a_group"])
def test_before_and_after(golden, case):
    golden(case, fuse_pointwise, FUSED)


def test_products_and_random_numbers_stay_outside_and_the_text_parses_back(captured):
    program, _ = captured
    fuse_pointwise.rewrite(program, FUSED)
    assert program.functions or not program.calls(torch.ops.aten.embedding.default)
    outside = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.native_dropout.default}
    for function in program.functions.values():
        assert function.is_fused and not outside & {node.target for node in function.computes}
    text = print_program(program)
    assert print_program(parse_program(text, program.constants)) == text


def test_exact_kernels_change_nothing(captured):
    program, plan = captured
    before = print_program(program)
    fuse_pointwise.rewrite(program, plan)
    assert print_program(program) == before
