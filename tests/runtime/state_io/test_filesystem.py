"""Files of torch.distributed.checkpoint: metadata without code, and errors that name their cause."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from geminifx.runtime.isa.errors import CheckpointError
from geminifx.runtime.state_io.filesystem import METADATA, Writer, read_metadata
from torch.distributed import checkpoint as dcp

# Each dtype, so that all of them may be named.
TENSORS = {str(dtype): torch.zeros(2, 3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8)}


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    dcp.save({**TENSORS, "object": {"step": 3}}, checkpoint_id=tmp_path, no_dist=True)
    found = read_metadata(tmp_path)
    assert found.state_dict_metadata == dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert found.state_dict_metadata["torch.bfloat16"].properties.dtype == torch.bfloat16


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


def test_code_in_metadata_is_not_run(tmp_path: Path) -> None:
    code = pickle.dumps(Runs(tmp_path / "ran"))
    (tmp_path / METADATA).write_bytes(code)
    with pytest.raises(CheckpointError, match=r"cannot read .*: it names \w+\.mkdir, which is not part of"):
        read_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(code)
    assert (tmp_path / "ran").exists(), "what another reader does"


def test_a_way_around_by_attributes_is_closed(tmp_path: Path) -> None:
    # A name with dots is looked up attribute by attribute: what a permitted module imports would be within reach.
    (tmp_path / METADATA).write_bytes(
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08os.mkdir\x93\x8c\x03ran\x85R."
    )
    with pytest.raises(CheckpointError, match=r"it names torch\.distributed\.checkpoint\.metadata\.os\.mkdir"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no checkpoint in .*: no .metadata"),
        (b"", "cannot read .*: Ran out of input"),
        (pickle.dumps({"step": 3}), "cannot read .*: it does not contain metadata, but a dict"),
    ],
)
def test_what_is_no_metadata_is_told(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_metadata(tmp_path)


@pytest.mark.parametrize("full", [True, False])
def test_a_failed_write_names_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            if full:
                raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", fail)
    with pytest.raises(dcp.CheckpointException) as raised:
        dcp.save(dict(TENSORS), storage_writer=Writer(tmp_path), no_dist=True)
    error = raised.value.failures[0][0]
    assert (type(error), "No space" in str(error)) == ((OSError, True) if full else (RuntimeError, False))
