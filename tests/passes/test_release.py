"""release: a chunk is let go once nothing reads it any more, and its gradients leave only then."""

import pytest
from geminifx.passes.program.plan import Plan
from geminifx.passes.release import release


@pytest.mark.parametrize("case", ["last_reader_through_views", "at_once", "then_reduce"])
def test_before_and_after(golden, case):
    golden(case, release, Plan())
