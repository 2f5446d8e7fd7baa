"""average: the loss over all ranks' tokens."""

import pytest
from geminifx.passes.average import average
from geminifx.passes.plan import Plan
from geminifx.runtime.mesh import DATA, Axis, Mesh


@pytest.mark.parametrize("case", ["mean_of_a_loss", "fused_loss", "sums_and_other_outputs"])
def test_before_and_after(golden, case):
    golden(case, average, Plan(mesh=Mesh((Axis(DATA, 2),))))


def test_alone_nothing_changes(captured, same):
    program, _ = captured
    before = program.copy()
    average.rewrite(program, Plan())
    same(program, before)
