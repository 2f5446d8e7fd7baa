"""The files of torch.distributed.checkpoint (DCP): reads the pickled metadata without running code, takes checksums
while writing, and raises the cause of a failed write."""

import io
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..isa.errors import CheckpointError
from .checksums import Checksum

METADATA = ".metadata"
"""The file that identifies a checkpoint of torch.distributed.checkpoint."""

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
"""The classes and functions that metadata may refer to, by module: they make plain values and run no code."""


class _Unpickler(pickle.Unpickler):
    """Unpickles nothing but `_PARTS`."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _PARTS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint's metadata")
        return super().find_class(module, name)


def read_metadata(directory: str | Path) -> Metadata:
    """A checkpoint's metadata.

    Raises CheckpointError if there is none, or it is damaged or refers to anything but `_PARTS`.
    """
    file = Path(directory) / METADATA
    try:
        with file.open("rb") as stream:
            found = _Unpickler(stream).load()
        _check(found)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"there is no checkpoint in {directory}: no {METADATA}") from error
    # A damaged pickle may call anything in `_PARTS` with any arguments, and so raise any error.
    except Exception as error:
        raise CheckpointError(f"cannot read {file}: {error or type(error).__name__}") from error
    return cast(Metadata, found)


def _check(found: Any) -> None:
    """Raises ValueError, or whatever odd values raise, unless this is metadata whose tensors are stored completely."""
    if not isinstance(found, Metadata):
        raise ValueError(f"it does not contain metadata, but a {type(found).__name__}")
    for name, entry in found.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            indices = [MetadataIndex(name)]
        elif isinstance(entry, TensorStorageMetadata):
            indices = [MetadataIndex(name, chunk.offsets, i) for i, chunk in enumerate(entry.chunks)]
            if sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
                raise ValueError(f"the parts of {name} do not make up the entire tensor")
        else:
            raise ValueError(f"it has a {type(entry).__name__} for {name}")
        for place in (found.storage_data[index] for index in indices):
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"{name} would be read from {place.relative_path}, outside the checkpoint")


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint whose metadata is `metadata`."""

    def __init__(self, directory: str | Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


@contextmanager
def quiet() -> Iterator[None]:
    """Silences DCP's warning that there is no process group: one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Summed(io.BufferedWriter):
    """A file that is written sequentially, and the checksum of what has been written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("wb", buffering=0))
        self.checksum = Checksum()

    def write(self, data: Any, /) -> int:
        self.checksum = self.checksum.then(data)
        return super().write(data)


class _Summing(FileSystem):
    """Keeps the checksums of the files that it writes, by name."""

    def __init__(self) -> None:
        self.checksums: dict[str, Checksum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb"
        with _Summed(Path(path)) as stream:
            yield stream
        self.checksums[Path(path).name] = stream.checksum


class Writer(dcp.FileSystemWriter):
    """Raises OSError if a file cannot be written, where torch's writer raises another error while closing its own file.
    `checksums` are those of the files that this process wrote, by name."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.fs = _Summing()

    @property
    def checksums(self) -> dict[str, Checksum]:
        return self.fs.checksums

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
