"""What killed saves leave beside a checkpoint: how it is told from saves that are running, restored and removed.

A save writes `.NAME.new-XXXX` beside NAME, and locks it while it runs: the lock ends with its process. Where two
directories cannot be swapped in one step, the old one is called `.NAME.old-XXXX` for a moment. Both are used only if
there is nothing at NAME, and the next save removes them. On a file system without locks they stay until somebody
removes them.
"""

import fcntl
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .checksums import is_sealed

_NEW, _OLD = "new", "old"


def old_name(target: Path) -> Path:
    """A new name for what was at `target` until now."""
    return _name(target, _OLD)


@contextmanager
def fresh(target: Path) -> Iterator[Path]:
    """Yields a new directory beside `target`, with the same permissions; at the end, removes whatever has its name."""
    while (made := _made(target)) is None:
        pass
    path, lock = made
    try:
        yield path
    finally:
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def put_back(path: str | Path) -> Path:
    """Returns the place of a checkpoint. If there is nothing at `path`, but a killed save left whole ones beside it,
    moves the newest there; if it cannot be moved, returns where it is."""
    target = Path(path).resolve()
    if target.exists():
        return target
    for found in _abandoned(target):
        if f".{_NEW}-" in found.name and not is_sealed(found):
            continue
        warnings.warn(
            f"there is nothing at {target}, but {found.name} next to it is complete: a save was killed just before "
            "renaming it, so it is used now",
            stacklevel=2,
        )
        try:
            os.rename(found, target)
        except OSError:
            if not target.exists() and found.exists():
                return found  # it cannot be moved
        # Or another process was quicker.
        return target
    return target


def sweep(target: Path) -> None:
    """Removes what saves to `target` left that are no longer running."""
    for found in _abandoned(target):
        with suppress(FileNotFoundError), _locked(found, fcntl.LOCK_EX) as idle:
            if idle:
                shutil.rmtree(found, ignore_errors=True)


def _name(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{secrets.token_hex(4)}"


def _made(target: Path) -> tuple[Path, int] | None:
    """A new directory and its lock; None if another save removed it as a leftover before it was locked."""
    path, replaced = _name(target, _NEW), None
    with suppress(FileNotFoundError):
        replaced = target.stat()
    os.mkdir(path, 0o777 if replaced is None else 0o700)
    try:
        if replaced is not None:
            _share_like(replaced, path)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # without locks nobody removes it
        fcntl.flock(lock, fcntl.LOCK_EX)
    if path.exists():
        return path, lock
    os.close(lock)
    return None


def _share_like(replaced: os.stat_result, path: Path) -> None:
    """Lets those who may read and write what is replaced do so at `path`. If its group cannot be set, the directory has
    another group, which gets no access."""
    mode = stat.S_IMODE(replaced.st_mode)
    if replaced.st_gid != path.stat().st_gid:
        try:
            os.chown(path, -1, replaced.st_gid)
        except PermissionError:
            mode &= ~(stat.S_IRWXG | stat.S_ISGID)
    os.chmod(path, mode)


def _abandoned(target: Path) -> list[Path]:
    """Directories that killed saves to `target` left, the newest first; none that another user may have planted."""
    prefixes = tuple(f".{target.name}.{kind}-" for kind in (_NEW, _OLD))
    try:
        owners = {os.geteuid(), os.stat(target.parent).st_uid}
        with os.scandir(target.parent) as entries:
            named = [e for e in entries if e.name.startswith(prefixes) and e.is_dir(follow_symlinks=False)]
        found = [(e.stat().st_mtime, Path(e.path)) for e in named if e.stat().st_uid in owners]
        return [path for _, path in sorted(found, reverse=True) if _is_idle(path)]
    except OSError:  # another process is restoring or removing one
        return []


def _is_idle(path: Path) -> bool:
    with _locked(path, fcntl.LOCK_SH) as idle:
        return idle


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[bool]:
    """Locks a directory. Yields whether nobody writes to it, now and while this is open; without locks, False."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(directory, kind | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(directory)
