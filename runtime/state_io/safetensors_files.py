"""Weights as safetensors files, read and written tensor by tensor: a model's weights are never in memory twice."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..isa.errors import CheckpointError, as_cause

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""The dtypes that weights and buffers may have here, by safetensors' names."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a directory, by name. `aliases` maps further names, which files of ours store, to tensors'.
    `stamps` has each file's inode, size and modification time (ns), which change when another file replaces it."""

    directory: Path
    entries: dict[str, Entry]
    aliases: dict[str, str]
    stamps: dict[Path, tuple[int, int, int]]

    @classmethod
    def found(cls, directory: str | Path) -> "WeightFiles":
        """Reads the headers of a directory's files, but no weights.

        Raises CheckpointError if there are no files, or one is missing, cut off or damaged in its header.
        """
        folder = Path(directory)
        entries: dict[str, Entry] = {}
        aliases: dict[str, str] = {}
        stamps: dict[Path, tuple[int, int, int]] = {}
        for file, expected in _files(folder).items():
            with _opened(file) as opened:
                stamps[file] = _stamp(file)
                told = {name: _entry(file, name, opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
                aliases |= {alias: name for alias, name in (opened.metadata() or {}).items() if name in told}
            missing = sorted(set(expected) - told.keys())
            if missing:
                raise CheckpointError(f"nothing was loaded: {file} lacks {missing[0]}, which {INDEX} says is in it")
            entries |= told
        return cls(folder, entries, aliases, stamps)

    def check(self) -> None:
        """Raises CheckpointError if the files are no longer what they were."""
        if WeightFiles.found(self.directory) != self:
            raise CheckpointError(
                f"nothing was loaded: the files in {self.directory} were replaced in the meantime; call "
                "load_pretrained() again to read the new ones"
            )

    def digest(self, names: Iterable[str]) -> str:
        """A hash of the tensors of these names: of their names, shapes, dtypes and some values, not of their files."""
        found = hashlib.sha256()

        def take(name: str, slices: Any) -> None:
            entry = self.entries[name]
            found.update(repr((name, entry.shape, entry.dtype)).encode())
            for values in _some_rows(slices, entry.shape):
                found.update(values.reshape(-1).view(torch.uint8).numpy())

        self.read(sorted(names), take)
        return found.hexdigest()

    def tensor(self, name: str) -> Tensor:
        """One tensor, read whole; for small ones. Raises CheckpointError if its file is damaged."""
        with _opened(self.entries[name].file) as opened:
            return opened.get_tensor(name)

    def read(self, names: Iterable[str], take: Callable[[str, Any], None]) -> None:
        """Calls `take` with each tensor's name and an object that is sliced to read it (a 0-d tensor is passed as it
        is); one file is open at a time.

        Raises CheckpointError if a file is damaged, or was replaced since it was found: some are taken by then.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        for file, inside in by_file.items():
            with _opened(file) as opened:
                for name in inside:
                    take(name, opened.get_slice(name) if self.entries[name].shape else opened.get_tensor(name))
                if _stamp(file) != self.stamps[file]:
                    raise CheckpointError(
                        f"{file} was replaced while its weights were being read: some come from the old file and some "
                        "from the new one; load them again when nothing writes there"
                    )


def _files(folder: Path) -> dict[Path, list[str]]:
    """A model's files, and the tensors that each should contain. A single file takes precedence over an index, as in
    transformers: the index may be left over from a former model."""
    if (folder / ONE_FILE).is_file():
        return {folder / ONE_FILE: []}
    index = folder / INDEX
    if index.is_file():
        try:
            placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            found: dict[Path, list[str]] = {}
            for name, file in placed.items():
                if Path(file).name != file:
                    raise ValueError(f"{name} would be read from {file}, outside the directory")
                found.setdefault(folder / file, []).append(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"nothing was loaded: cannot read {index}: {error or type(error).__name__}"
            ) from error
        return found
    others = sorted(file.name for file in folder.glob("*.bin"))
    hint = f"; {others[0]} has another format: load it with transformers and save_pretrained() it" if others else ""
    raise CheckpointError(f"there are no weights in {folder}: neither {ONE_FILE} nor {INDEX}{hint}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An open file, whose tensors are read from disk when they are asked for."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            yield opened
    except FileNotFoundError as error:
        raise CheckpointError(f"nothing was loaded: {file} is missing, which {INDEX} names") from as_cause(error)
    except (SafetensorError, OSError) as error:
        size = f", {file.stat().st_size:,} bytes" if file.is_file() else ""
        raise CheckpointError(
            f"{file}{size} is damaged or truncated: {error}; download it again, or load another checkpoint"
        ) from as_cause(error)


def _some_rows(slices: Any, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The first, the middle and the last row of a tensor; all of one without rows, and nothing of an empty one."""
    corners = {tuple((size - 1) * half // 2 for size in shape[:-1]) for half in range(3)} if prod(shape) else ()
    for corner in sorted(corners):
        yield slices[(*corner, *(slice(0, size) for size in shape[-1:]))]


def _stamp(file: Path) -> tuple[int, int, int]:
    told = file.stat()
    return told.st_ino, told.st_size, told.st_mtime_ns


def _entry(file: Path, name: str, slices: Any) -> Entry:
    dtype = _DTYPES.get(slices.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"nothing was loaded: {name} in {file} is of dtype {slices.get_dtype()}, expected one of "
            f"{', '.join(_DTYPES)}"
        )
    return Entry(file, tuple(slices.get_shape()), dtype)


def write(directory: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], read: Callable[[str], Tensor],
          max_shard_bytes: int, aliases: Mapping[str, str]) -> None:  # fmt: skip
    """Writes tensors of these shapes and dtypes, which `read` makes one by one. Files are at most `max_shard_bytes`
    large, unless a single tensor is larger; one file's tensors are in memory at a time. `aliases` maps further names to
    tensors' names."""
    shards = _shards({name: prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}, max_shard_bytes)
    stem, count = ONE_FILE.removesuffix(".safetensors"), len(shards)
    named = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [ONE_FILE]
    placed: dict[str, str] = {}
    for file, names in zip(named, shards, strict=True):
        values = {name: read(name).contiguous() for name in names}
        held = {alias: name for alias, name in aliases.items() if name in values}
        save_file(values, str(directory / file), metadata={**held, "format": "pt"})
        placed |= dict.fromkeys(names, file)
        del values
    if count > 1:
        total = sum(prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, num_bytes in sizes.items():
        if shards[-1] and filled + num_bytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards
