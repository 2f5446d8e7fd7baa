"""chunk: parameters come out of chunks, gradients go into them."""

import pytest
from geminifx.passes.chunk import chunk
from geminifx.passes.program.plan import Plan


@pytest.mark.parametrize(
    "case, chunks",
    [
        ("once_per_phase", [["fc.a", "fc.b"]]),
        ("two_chunks", [["a"], ["b"]]),
        ("without_gradient", [["idle", "a", "frozen", "b"]]),
    ],
)
def test_before_and_after(golden, layout, case, chunks):
    golden(case, chunk, Plan(layout=layout(*chunks)))
