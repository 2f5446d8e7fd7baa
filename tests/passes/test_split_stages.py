"""split_stages: the programs of all ranks of a pipeline together compute what one program of all stages does."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from geminifx.passes.program.plan import Plan
from geminifx.passes.split_stages import split_stages
from geminifx.runtime.isa.errors import ShardingError
from geminifx.runtime.isa.schedule import Schedule

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from pipelines import Step, step_of  # noqa: E402
from zoo import GPT2, LLAMA, OPT, Case, gpt2, opt  # noqa: E402

ONE_F_ONE_B = Schedule.parse("""\
1f1b stages=2 microbatches=2
rank 0: F0.0 F0.1 B0.0 B0.1
rank 1: F1.0 B1.0 F1.1 B1.1""")
DIVIDED = Schedule.parse("""\
divided stages=2 microbatches=2
rank 0: F0.0 F0.1 I0.0 W0.0 I0.1 W0.1
rank 1: F1.0 I1.0 F1.1 I1.1 W1.0 W1.1""")
PLAN = Plan(microbatches=2, blocks=("layers.0", "layers.1"), stages=("", "layers.1"))


@pytest.mark.parametrize(
    ("case", "schedule", "line"),
    [("first_of_two", ONE_F_ONE_B, 0), ("second_of_two", ONE_F_ONE_B, 1), ("weights_later", DIVIDED, 1)],
)
def test_before_and_after(golden, case, schedule, line):
    golden(case, split_stages, replace(PLAN, schedule=schedule, line=line))
