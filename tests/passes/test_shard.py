"""shard: one rank's program of its parts, and what is refused."""

import pytest
from geminifx.passes.plan import Plan
from geminifx.passes.shard import shard
from sharding import declared, plan_for


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        ("two_linears", declared("1d", 2)),
        ("one_linear", declared("2d", 4)),
        ("vocabulary", declared("1d", 2)),
    ],
)
def test_before_and_after(golden, case, parallel):
    golden(case, shard, plan_for(parallel))


def test_alone_nothing_changes(captured, same):
    program, _ = captured
    before = program.copy()
    shard.rewrite(program, Plan())
    same(program, before)
