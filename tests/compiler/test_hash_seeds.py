"""Ranks that are launched by themselves hash strings differently: what they capture and plan must not depend on it."""

import os
import subprocess
import sys

import pytest

PRINTS = """
import sys
sys.path[:0] = {path!r}
import geminifx
from zoo import GPT2, OPT

for case in (OPT, GPT2):
    for parallel in ({{"data": 2, "tensor": "1d:2"}}, {{"pipeline": 2, "data": 2}}, "auto"):
        model = geminifx.compile(case.seeded(), device_budget="64MB", world_size=4, parallel=parallel,
                                 example_inputs=case.batch(4))
        print(model.plan.to_json())
        print(*model.graph.values())
"""


@pytest.mark.slow
def test_plans_and_programs_are_the_same_whatever_strings_hash_to() -> None:
    script = PRINTS.format(path=sys.path)
    found = [
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert found[0] == found[1] and found[0].count("def training") == 6
