"""Two real processes, each with half of the batch, train as one process with all of it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from worker import CASES, RANKS, ROWS, train  # noqa: E402

# The ranks add their halves of a gradient, one process adds all rows: another order of sums of some hundred terms,
# 2^-24 each. AdamW divides by the root of its square, so that it moves parameters by what is rounding alone, by lr
# (1e-2) a step at most, where a gradient is rounding alone; everywhere else by its relative error.
LOSS = 2**-18
PARAMETER, LR = 2**-12, 1e-2


def launch(script: Path, *arguments: str, ranks: int = RANKS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    done = launch(HERE / "worker.py", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(found: dict[str, Any], name: str) -> None:
    losses, state = train(replace(CASES[name], tight=False), slice(0, ROWS))
    for agrees, ranks_losses in found[name]["ranks"]:
        assert agrees, "both ranks hold the same bits"
        for ours, expected in zip(ranks_losses, losses, strict=True):
            assert abs(ours - expected) <= LOSS * expected
    apart = [(found[name]["state"][key] - value).abs() for key, value in state.items()]
    steps = len(losses)
    assert max(a.max().item() for a in apart) <= 2 * LR * steps
    far = sum((a > PARAMETER * LR).sum().item() for a in apart)
    assert far <= 0.02 * sum(a.numel() for a in apart), "all but a few, whose gradients are rounding alone"
