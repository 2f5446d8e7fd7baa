"""What several GPUs are asked for can be asked for: a look on any machine, since those of several GPUs are rare."""

import sys
from pathlib import Path

import pytest
from geminifx.compiler.parallel import Parallel

sys.path.insert(0, str(Path(__file__).parent))

from nccl_worker import MODES, cases


@pytest.mark.parametrize("gpus", MODES)
def test_every_case_takes_all_gpus_and_can_be_asked_for(gpus: int) -> None:
    for name, case in cases(gpus).items():
        assert Parallel.of(case.parallel).mesh(None, gpus).size == gpus, name
        assert case.alone().parallel == {}, name
