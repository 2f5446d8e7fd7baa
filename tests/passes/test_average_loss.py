"""average_loss: the loss over all ranks' tokens."""

import pytest
from geminifx.passes.average_loss import average_loss
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.mesh import Axis, Mesh


@pytest.mark.parametrize("case", ["mean_of_a_loss", "fused_loss", "sums_and_other_outputs", "smoothed_labels"])
def test_before_and_after(golden, case):
    golden(case, average_loss, Plan(mesh=Mesh((Axis("data", 2, "data"),))))


def test_alone_nothing_changes(captured, same):
    program, _ = captured
    before = program.copy()
    average_loss.rewrite(program, Plan())
    same(program, before)
