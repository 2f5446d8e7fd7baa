"""Checkpoint directories that are either the old one or the new one, never half of each."""

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
    """Yields a temporary directory beside `path`. On success it takes the place of `path`, sealed and with the same
    permissions; on failure it is removed and `path` stays as it was. A link to a directory stays a link. A seal marks a
    directory as complete; with `stays_sealed` False it is removed again once the directory is in place, for directories
    that other programs may write to.

    Raises whatever the body raises, and OSError if the disk is full, the place cannot be written, or `path` is a file.
    """
    target = put_back(path)
    if target.is_file():  # a single check: another save may be replacing the directory
        raise NotADirectoryError(f"{path} is a file, which the checkpoint would overwrite; expected a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with fresh(target) as temporary:
        yield temporary
        if not is_sealed(temporary):
            seal(temporary)
        _flush(temporary)
        install(temporary, target)
        if not stays_sealed:
            with suppress(FileNotFoundError):  # another save was faster
                (target / CHECKSUMS).unlink()
        _flush_one(target.parent)
    sweep(target)


@contextmanager
def shared_directory(path: str | Path, ranks: Ranks, stays_sealed: bool = True) -> Iterator[Path]:
    """Like `atomic_directory`, for all ranks together: they yield the same directory, on a shared file system, and
    leave once `path` is the new one for all of them.

    Raises what the body raises; ranks where it raised nothing raise StateError, which names the others' errors.
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
    """Flushes all files to disk, so that disk errors are raised before the old checkpoint is touched."""
    for folder, _, names in os.walk(directory):
        for name in names:
            file = Path(folder, name)
            if not file.is_symlink():
                _flush_one(file)
        _flush_one(Path(folder))


def _flush_one(path: Path) -> None:
    """Waits until a file's bytes, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
