"""split_batch: a batch as microbatches, block by block, beside the whole batch and calls with its parts."""

from dataclasses import replace

import pytest
from geminifx.passes.program.plan import Plan
from geminifx.passes.split_batch import split_batch

PLAN = Plan(microbatches=2, blocks=("layers.0", "layers.1"))


@pytest.mark.parametrize("case", ["two_blocks", "mean_of_a_loss", "dropout"])
def test_before_and_after(golden, case):
    golden(case, split_batch, PLAN)


def test_rounds(golden):
    golden("rounds", split_batch, replace(PLAN, blocks=("layers.0",), rounds=2))


def test_a_whole_batch_stays_as_it_is(captured, same):
    program, _ = captured
    before = program.copy()
    split_batch.rewrite(program, Plan())
    same(program, before)
