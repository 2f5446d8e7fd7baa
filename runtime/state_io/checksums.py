"""Checksums of saved files: `checksums.json` beside them lists the size and CRC-32 of each.

That file is written last; a directory that has it is sealed. A subdirectory with a list of its own is represented by
that list alone. Files added to a directory later are not listed, and are ignored.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from ..distributed.ranks import ALONE, Ranks
from ..isa.errors import CheckpointError

CHECKSUMS = "checksums.json"
_VERSION = 1
_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Checksum:
    """The size and CRC-32 of the bytes so far."""

    size_bytes: int = 0
    crc32: int = 0

    def then(self, piece: bytes | bytearray | memoryview) -> "Checksum":
        return Checksum(self.size_bytes + memoryview(piece).nbytes, zlib.crc32(piece, self.crc32))

    @classmethod
    def of(cls, file: Path) -> "Checksum":
        found, buffer = cls(), memoryview(bytearray(_PIECE_BYTES))
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                found = found.then(buffer[:count])
        return found


def is_sealed(directory: Path) -> bool:
    """Whether the directory was written completely."""
    return (directory / CHECKSUMS).is_file()


def seal(directory: Path, known: Mapping[str, Checksum] | None = None) -> None:
    """Writes the list of a complete directory's files. Files in `known`, by name, are not read again."""
    known = known or {}
    found = {name: known.get(name) or Checksum.of(directory / name) for name in sorted(_files(directory))}
    listed = {"version": _VERSION, "files": {name: asdict(checksum) for name, checksum in found.items()}}
    with (directory / CHECKSUMS).open("x", encoding="utf-8") as stream:
        json.dump(listed, stream, indent=1)


def verify(directory: Path, ranks: Ranks = ALONE, *, deep: bool = True) -> bool:
    """Checks the files that a directory lists, each rank a part of them; if `deep`, also those that subdirectories
    list. Returns False if the directory is not sealed, as older versions left it.

    Raises CheckpointError on all ranks if a file is not as it was saved, and tells which files are.
    """
    if not ranks.gather(is_sealed(directory))[0]:
        return False
    parts = ranks.size if ranks.together else 1
    told = ranks.gather(_verdicts(directory, deep, ranks.rank if ranks.together else 0, parts))
    verdicts = {name: verdict for each in told for name, verdict in each.items()}
    damaged = [f"{name} {verdict}" for name, verdict in verdicts.items() if verdict]
    if damaged:
        intact = [name for name, verdict in verdicts.items() if not verdict]
        raise CheckpointError(
            f"{directory} is damaged: {'; '.join(damaged)}. Intact: {', '.join(intact) or 'nothing'}. Nothing was "
            "loaded: restore the damaged files from a copy, or use another checkpoint. If you changed a file on "
            f"purpose, remove {CHECKSUMS}"
        )
    return True


def _verdicts(directory: Path, deep: bool, part: int, parts: int) -> dict[str, str]:
    """What is wrong with each file of one part of the list, by name; "" for intact files."""
    try:
        listed = sorted(_listed(directory, deep).items())
    except CheckpointError as error:
        return {CHECKSUMS: str(error)}
    return {name: _verdict(directory / name, checksum) for name, checksum in listed[part::parts]}


def _verdict(file: Path, expected: Checksum) -> str:
    try:
        size_bytes = file.stat().st_size
        if size_bytes != expected.size_bytes:
            return f"has {size_bytes} bytes instead of {expected.size_bytes}"
        return "" if Checksum.of(file) == expected else "differs from the bytes that were saved"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _listed(directory: Path, deep: bool) -> dict[str, Checksum]:
    """The files that a directory lists. Raises CheckpointError if the list itself is damaged."""
    try:
        data = json.loads((directory / CHECKSUMS).read_bytes())
        if data["version"] != _VERSION:
            raise CheckpointError(f"has version {data['version']}, but this program reads version {_VERSION}")
        found = {_inside(name): Checksum(**checksum) for name, checksum in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot be read ({type(error).__name__}: {error})") from error
    for name in [name for name in found if deep and PurePosixPath(name).name == CHECKSUMS and name != CHECKSUMS]:
        below = PurePosixPath(name).parent
        found |= {str(below / inner): checksum for inner, checksum in _listed(directory / below, deep).items()}
    return found


def _inside(name: str) -> str:
    """Returns the name if it is inside the directory, else raises ValueError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"it lists {name}, which is not in the directory")
    return name


def _files(directory: Path, below: str = "") -> Iterator[str]:
    """The names of all files, including those in subdirectories; of a sealed one, only its list of checksums."""
    with os.scandir(directory / below) as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            if not entry.is_dir(follow_symlinks=False):
                yield name
            elif is_sealed(Path(entry.path)):
                yield f"{name}/{CHECKSUMS}"
            else:
                yield from _files(directory, f"{name}/")
