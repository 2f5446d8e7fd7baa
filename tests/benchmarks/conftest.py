"""The benchmarks are scripts beside each other, not a package: their folder is put where Python looks for modules."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on several threads, by far where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
