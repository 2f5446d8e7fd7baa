"""The files of torch.distributed.checkpoint: metadata, which is a pickle, is read without running code, and a failed
write tells why."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..isa.errors import CheckpointError

METADATA = ".metadata"
"""The file that tells a checkpoint of torch.distributed.checkpoint."""

_PARTS = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # of Python 3.13
}
"""All that metadata consists of, by module: plain values."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _PARTS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint's metadata")
        return super().find_class(module, name)


def read_metadata(directory: str | Path) -> Metadata:
    """What a checkpoint holds.

    Raises CheckpointError where there is none, or its metadata is damaged or names what it need not.
    """
    file = Path(directory) / METADATA
    try:
        with file.open("rb") as stream:
            found = _Unpickler(stream).load()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"there is no checkpoint in {directory}: no {METADATA}") from error
    # Whatever the bytes of a damaged pickle stand for is called with whatever they give it.
    except Exception as error:
        raise CheckpointError(f"cannot read {file}: {error or type(error).__name__}") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"cannot read {file}: it holds no metadata, but {type(found).__name__}")
    return found


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint whose metadata is `metadata`."""

    def __init__(self, directory: str | Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class Writer(dcp.FileSystemWriter):
    """Raises OSError where a file cannot be written: torch then closes its own file in it with another error."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause = error.__context__
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise cause from error
