"""prefetch: copies start early and gradients are accumulated late, each on its own side of the turn."""

import pytest
from geminifx.passes.prefetch import prefetch
from geminifx.passes.program.plan import Plan


@pytest.mark.parametrize("case, depth", [("one_ahead", 1), ("two_ahead", 2), ("on_demand", 0), ("accumulates_late", 1)])
def test_before_and_after(golden, case, depth):
    golden(case, prefetch, Plan(prefetch=depth))
