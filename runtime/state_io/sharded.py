"""Checkpoints of tensors that are sharded over processes, by torch.distributed.checkpoint (DCP).

Each process writes the rectangles of the whole tensors that it holds, and reads those that it needs. A reader need not
know how many processes wrote a checkpoint, or how they sharded tensors. Nothing is gathered.
"""

import io
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from torch import Size, Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.utils import _pytree as pytree

from ..distributed.local_shards import Region
from ..distributed.ranks import Ranks
from ..isa.errors import CheckpointError, as_cause
from ..memory.stored import Stored
from .atomic_directory import shared_directory
from .background import Copies, Copying
from .checksums import CHECKSUMS, seal, verify
from .filesystem import METADATA, Reader, Writer, quiet, read_metadata
from .leftovers import put_back


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is to hold: tensors, with the same names on all processes, and rank 0's objects, of types that
    load without running code."""

    tensors: Mapping[str, Stored]
    objects: Mapping[str, Any]


def save(directory: str | Path, contents: Contents, ranks: Ranks, copying: Copying | None = None) -> None:
    """Replaces `directory` with a checkpoint. All processes call it, or a thread on each, which then writes the copies
    that `copying` makes.

    Raises CheckpointError if it cannot be written; what was saved before is intact.
    """
    with ranks.failing_alike():
        if ranks.rank == 0:  # the other ranks may see stale entries of a shared file system
            _check_replaced(put_back(directory))
    with replacing(directory, ranks) as temporary:
        write(temporary, contents, ranks, copying)


def _check_replaced(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()) and not (target / METADATA).is_file():
        raise CheckpointError(
            f"{target} contains files that are not a checkpoint, and saving would replace them; choose another "
            "directory"
        )


@contextmanager
def replacing(directory: str | Path, ranks: Ranks) -> Iterator[Path]:
    """Like `shared_directory`, but raises CheckpointError for what cannot be written."""
    outside = sys.exception()
    try:
        with shared_directory(directory, ranks) as temporary:
            yield temporary
    except (dcp.CheckpointException, OSError, SafetensorError) as error:
        if _is_interruption(error, outside):
            raise KeyboardInterrupt from as_cause(error)
        raise CheckpointError(
            f"could not save to {directory}: {_errors_of(error)}. A checkpoint saved there before is intact"
        ) from as_cause(error)


def write(directory: Path, contents: Contents, ranks: Ranks, copying: Copying | None = None) -> None:
    """Writes a checkpoint into a directory from `replacing`; all processes call it."""
    writer, saver = Writer(directory), _Saver(contents, copying)
    try:
        with nullcontext() if copying else quiet():
            dcp.save({}, storage_writer=writer, planner=saver, process_group=ranks.apart_group,
                     no_dist=not ranks.together)  # fmt: skip
    finally:  # the traceback of a failure keeps the saver alive
        saver.copies = None
    checksums = ranks.gather(writer.checksums)
    if ranks.rank == 0:
        seal(directory, {name: checksum for each in checksums for name, checksum in each.items()})


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files were verified to be as they were saved."""

    directory: Path
    metadata: Metadata
    ranks: Ranks

    @classmethod
    def found(cls, path: str | Path, ranks: Ranks) -> "Saved":
        """The checkpoint at `path`, or the one that a killed save left beside it. All processes call it.

        Raises CheckpointError if there is none or it is damaged; the error tells which files are damaged.
        """
        with ranks.failing_alike():
            directory = put_back(path) if ranks.rank == 0 else None
        directory = ranks.gather(directory)[0]
        sealed = verify(directory, ranks)
        with ranks.failing_alike():
            metadata = read_metadata(directory)
        if not sealed:
            warnings.warn(
                f"{directory} has no {CHECKSUMS}, so damage may go unnoticed; save the checkpoint again to get one",
                stacklevel=4,
            )
        return cls(directory, metadata, ranks)

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shapes and dtypes of its tensors, by name."""
        found = self.metadata.state_dict_metadata.items()
        tensors = {name: entry for name, entry in found if isinstance(entry, TensorStorageMetadata)}
        return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in tensors.items()}

    def read(self, tensors: Mapping[str, Stored], objects: tuple[str, ...] = ()) -> dict[str, Any]:
        """Reads `tensors` in place, and returns the objects of these names. All processes call it.

        Raises CheckpointError. If the checkpoint lacks a tensor, or has it in another shape, nothing is changed; if it
        cannot be read to its end, some tensors are.
        """
        loader, reader, outside = _Loader(tensors, objects), Reader(self.directory, self.metadata), sys.exception()
        try:
            with quiet():
                dcp.load({}, storage_reader=reader, planner=loader, no_dist=not self.ranks.together)
        except (dcp.CheckpointException, OSError) as error:
            if _is_interruption(error, outside):
                raise KeyboardInterrupt from error
            raise CheckpointError(f"could not load {self.directory}: {_errors_of(error)}") from error
        return loader.found


def _is_interruption(error: BaseException, outside: BaseException | None) -> bool:
    """Whether a failure is a Ctrl-C, which DCP catches like any error, or comes from one: torch's writer of archives
    fails while the interruption leaves it. `outside` is what was being handled already when this began."""
    failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else ()
    seen, left = [outside, None], [error, *(failure[0] for failure in failures)]
    while left:
        each = left.pop()
        if isinstance(each, KeyboardInterrupt):
            return True
        seen.append(each)
        left += [cause for cause in (each.__cause__, each.__context__) if cause not in seen]
    return False


def _errors_of(error: BaseException) -> str:
    """The processes' errors, without their tracebacks."""
    if not isinstance(error, dcp.CheckpointException):
        return str(error)
    told = {f"{type(failure[0]).__name__}: {failure[0]}": rank for rank, failure in error.failures.items()}
    return "; ".join(f"rank {rank} failed with {text}" for text, rank in told.items())


def _chunk(region: Region) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(Size(region.offsets), Size(region.sizes))


class _Saver(dcp.DefaultSavePlanner):
    """Writes the regions of `Stored` tensors; of a region that several processes hold, one writes."""

    def __init__(self, contents: Contents, copying: Copying | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors, self.objects, self.copying = contents.tensors, contents.objects, copying
        self.regions: dict[MetadataIndex, tuple[Stored, Region]] = {}
        self.copies: Copies | None = None

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, stored in self.tensors.items():
            for region in stored.regions:
                index = MetadataIndex(name, Size(region.offsets))
                data = TensorWriteData(_chunk(region), TensorProperties(dtype=stored.dtype), Size(stored.shape))
                self.regions[index] = stored, region
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        if self.is_coordinator:
            items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.objects]
        self.plan = SavePlan(items)
        return self.plan

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        if self.copying is not None:
            self.copies = self.copying.copies(plan.items, self._read)
        return plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        # Each copy is dropped once it is written.
        return self._read(write_item) if self.copies is None else self.copies.pop(write_item.index)

    def _read(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return _packed(write_item.index.fqn, self.objects[write_item.index.fqn])
        stored, region = self.regions[write_item.index]
        return stored.read(region).detach()


def _packed(name: str, value: Any) -> io.BytesIO:
    """Serializes an object. Raises CheckpointError now if it could not be loaded later."""
    value = pytree.tree_map_only(numpy.generic, lambda number: number.item(), value)  # learning rates may be numpy's
    data = io.BytesIO()
    try:
        torch.save(value, data)
        data.seek(0)
        torch.load(data, map_location="cpu", weights_only=True)
    # Pickling an object may run any code of its own, and so raise anything.
    except Exception as error:
        raise CheckpointError(
            f"{name!r} contains a value of a type that cannot be loaded without running code; expected numbers, "
            "strings, tensors, and lists, tuples and dicts of them: "
            f"{next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from error
    return data


class _Loader(dcp.DefaultLoadPlanner):
    """Reads the regions of `Stored` tensors; holds a piece at a time in memory beside them."""

    def __init__(self, tensors: Mapping[str, Stored], objects: tuple[str, ...]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors, self.objects = tensors, objects
        self.found: dict[str, Any] = {}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        entries, items = self.metadata.state_dict_metadata, []
        for name, stored in self.tensors.items():
            if not prod(stored.shape):
                continue
            entry = entries.get(name)
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(f"the checkpoint lacks {name}; it belongs to another model")
            if tuple(entry.size) != stored.shape:
                raise CheckpointError(f"{name} has shape {stored.shape}, but {tuple(entry.size)} in the checkpoint")
            items += create_read_items_for_chunk_list(name, entry, list(map(_chunk, stored.regions)))
        wanted = {name: MetadataIndex(name) for name in self.objects if name in entries}
        items += [_read_object(index) for index in wanted.values()]
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        entry = self.metadata.state_dict_metadata[read_item.dest_index.fqn]
        return torch.empty(read_item.lengths, dtype=entry.properties.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        stored, offsets = self.tensors[read_item.dest_index.fqn], tuple(read_item.dest_index.offset or ())
        region = next(region for region in stored.regions if region.offsets == offsets)
        extents = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        stored.write(region, tuple(slice(start, start + length) for start, length in extents), tensor)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.found[name] = torch.load(value, map_location="cpu", weights_only=True)
        # A damaged pickle may call what is allowed with any arguments, and so raise any error.
        except Exception as error:
            raise CheckpointError(
                f"{name!r} is damaged, or of a type that cannot be loaded without running code"
            ) from error


def _read_object(index: MetadataIndex) -> ReadItem:
    none = Size((0,))
    return ReadItem(dcp.planner.LoadItemType.BYTE_IO, index, none, index, none, none)
