"""Eight real processes sum gradients over several sets of axes, in the dtype that is asked for, to the bit."""

from pathlib import Path

import pytest
from launching import launched

WORKER = Path(__file__).with_name("reduction_worker.py")


@pytest.mark.slow
def test_sums_over_any_set_of_axes_are_what_is_asked_for_bit_for_bit(tmp_path: Path) -> None:
    assert launched(WORKER, tmp_path / "found.pt", ranks=8) == [[]] * 8
