"""Eight real processes sum gradients over several sets of axes, in the dtype that is asked for, to the bit."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from test_data_parallel import launch  # noqa: E402


def test_sums_over_any_set_of_axes_are_what_is_asked_for_bit_for_bit(tmp_path: Path) -> None:
    out = tmp_path / "found.pt"
    done = launch(HERE / "reduction_worker.py", str(out), ranks=8)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(out) == [[]] * 8
