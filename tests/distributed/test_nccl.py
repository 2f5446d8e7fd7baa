"""Several GPUs, which exchange over NCCL, train as one does. As many are taken as there are, 8, 4 or 2."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import finder, torchrun

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from nccl_worker import MODES, SAVED, cases  # noqa: E402
from nearness import check  # noqa: E402
from worker import train  # noqa: E402

THERE = int(os.environ["TESTS_GPUS"])
GPUS = max((number for number in MODES if number <= THERE), default=2)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.skipif(THERE < 2, reason="needs two GPUs or more"),
]
Finder = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Finder:
    launches = {GPUS: ((*cases(GPUS), SAVED),)}
    return finder(HERE / "nccl_worker.py", tmp_path_factory.mktemp("gpus"), launches, torchrun)


@pytest.mark.parametrize("name", cases(GPUS))
def test_gpus_train_as_one_process(found: Finder, name: str) -> None:
    alone = cases(GPUS)[name].alone()
    check(found(name, GPUS), train(alone, alone.rows(0)), cases(GPUS)[name])


def test_a_checkpoint_of_several_gpus_comes_back(found: Finder) -> None:
    assert found(SAVED, GPUS)
