"""canonicalize: no-ops, shared parameters, repetitions, dead code."""

import pytest
from geminifx.passes.canonicalize import canonicalize
from geminifx.passes.program.plan import Plan


@pytest.mark.parametrize("case", ["tied_and_repeated", "copies_and_views", "what_stays", "gradient_of_the_second_name"])
def test_before_and_after(golden, case):
    golden(case, canonicalize, Plan())


def test_a_second_run_changes_nothing(captured, same):
    program, plan = captured
    canonicalize.rewrite(program, plan)
    once = program.copy()
    canonicalize.rewrite(program, plan)
    same(program, once)
