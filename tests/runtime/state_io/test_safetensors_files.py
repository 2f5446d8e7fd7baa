"""Weights in safetensors files: those that change while they are read are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from geminifx.runtime.isa.errors import CheckpointError
from geminifx.runtime.state_io.safetensors_files import ONE_FILE, WeightFiles
from safetensors.torch import save_file
from torch import Tensor


def written(file: Path, value: float) -> None:
    save_file({name: torch.full((4,), value) for name in ("a", "b")}, file, metadata={"format": "pt"})


def read(files: WeightFiles, before_b: Any = lambda: None) -> dict[str, Tensor]:
    """All weights, `b` behind what is done before it."""
    found: dict[str, Tensor] = {}

    def take(name: str, slices: Any) -> None:
        if name == "b":
            before_b()
        found[name] = slices[:].clone()

    files.read(("a", "b"), take)
    return found


def test_files_that_stay_are_read(tmp_path: Path) -> None:
    written(tmp_path / ONE_FILE, 1.0)
    assert all(torch.equal(value, torch.ones(4)) for value in read(WeightFiles.found(tmp_path)).values())


@pytest.mark.parametrize("way", ["in its place", "by another file"])
def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path, way: str) -> None:
    file, other = tmp_path / ONE_FILE, tmp_path / "other"
    written(file, 1.0)
    written(other, 2.0)
    replace = (lambda: other.replace(file)) if way == "by another file" else lambda: written(file, 2.0)
    with pytest.raises(CheckpointError, match="was replaced while its weights were being read"):
        read(WeightFiles.found(tmp_path), replace)
