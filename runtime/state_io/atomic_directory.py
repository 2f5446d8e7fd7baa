"""Checkpoints that are either the old one or the new one, never half of each."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..distributed.ranks import Ranks
from .checksums import CHECKSUMS, is_sealed, seal
from .exchange import install
from .leftovers import fresh, put_back, sweep


@contextmanager
def atomic_directory(path: str | Path, stays_sealed: bool = True) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it takes the place of `path`, sealed and with the same
    access; on failure it is removed and `path` is as before. A link to a directory stays one. With `stays_sealed`
    False the seal, which tells that a directory is whole, is taken off again at its place: other programs may write
    there.

    Raises whatever the body raises, and OSError where the disk is full, the place cannot be written, or `path`
    is a file.
    """
    target = put_back(path)
    if target.is_file():  # one look: another save may be replacing the directory
        raise NotADirectoryError(f"{path} is a file, which a checkpoint would replace; expected a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with fresh(target) as temporary:
        yield temporary
        if not is_sealed(temporary):
            seal(temporary)
        _flush(temporary)
        install(temporary, target)
        if not stays_sealed:
            with suppress(FileNotFoundError):  # another save was quicker
                (target / CHECKSUMS).unlink()
        _flush_one(target.parent)
    sweep(target)


@contextmanager
def shared_directory(path: str | Path, ranks: Ranks, stays_sealed: bool = True) -> Iterator[Path]:
    """As `atomic_directory`, for all ranks together: they yield the same directory, on a file system that all share,
    and leave when `path` is the new one on all of them.

    Raises what the body raises, and on ranks on which it raised nothing StateError, naming the others' errors.
    """
    with ExitStack() as stack:
        with ranks.failing_alike():
            made = stack.enter_context(atomic_directory(path, stays_sealed)) if ranks.rank == 0 else None
        directory = ranks.gather(made)[0]
        with ranks.failing_alike():
            yield directory
        with ranks.failing_alike():
            stack.close()


def _flush(directory: Path) -> None:
    """Errors of the disk must arise before the old checkpoint is touched."""
    for folder, _, names in os.walk(directory):
        for name in names:
            file = Path(folder, name)
            if not file.is_symlink():
                _flush_one(file)
        _flush_one(Path(folder))


def _flush_one(path: Path) -> None:
    """Wait for a file's bytes, or for the names in a directory, to be on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
