"""share_buffers: what a forward writes to buffers is the first rank's everywhere."""

from geminifx.passes.program.plan import Plan
from geminifx.passes.share_buffers import share_buffers
from geminifx.runtime.isa.mesh import Axis, Mesh


def test_before_and_after(golden):
    golden("of_two_dtypes", share_buffers, Plan(mesh=Mesh((Axis("data", 2, "data"),))))


def test_alone_nothing_changes(captured, same):
    program, _ = captured
    before = program.copy()
    share_buffers.rewrite(program, Plan())
    same(program, before)
