"""Eight real processes sum gradients over several sets of axes, in the dtype that is asked for, to the bit."""

from pathlib import Path

import torch
from launching import torchrun

WORKER = Path(__file__).with_name("reduction_worker.py")


def test_sums_over_any_set_of_axes_are_what_is_asked_for_bit_for_bit(tmp_path: Path) -> None:
    out = tmp_path / "found.pt"
    done = torchrun(WORKER, str(out), ranks=8)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(out) == [[]] * 8
