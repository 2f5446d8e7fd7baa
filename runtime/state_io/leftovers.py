"""What saves that were killed leave beside a checkpoint: told from those that run now, put back, swept.

A save writes `.NAME.new-XXXX` beside NAME, and locks it for as long as it runs: the lock goes with its process. Where
two directories cannot change places in one step, the old one is `.NAME.old-XXXX` for a moment. Both are used only where
there is nothing at NAME, and removed by the next save. A file system without locks keeps them until somebody removes
them.
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
    """A name for what was at `target` until now."""
    return _name(target, _OLD)


@contextmanager
def fresh(target: Path) -> Iterator[Path]:
    """Yield a new directory beside `target`, with the same access; whatever has its name afterwards is removed."""
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
    """The place of a checkpoint, where a save that was killed has left it beside this alone: there again, if it may be
    moved. Of several whole ones the newest is taken."""
    target = Path(path).resolve()
    if target.exists():
        return target
    for found in _abandoned(target):
        if f".{_NEW}-" in found.name and not is_sealed(found):
            continue
        warnings.warn(
            f"there is nothing at {target}, but {found.name} beside it is whole: a save was killed when it was about "
            "to put that there, and it is used now",
            stacklevel=2,
        )
        try:
            os.rename(found, target)
        except OSError:
            if not target.exists() and found.exists():
                return found  # it may not be moved
        # Or another process was quicker.
        return target
    return target


def sweep(target: Path) -> None:
    """Remove what saves to `target` left that run no more."""
    for found in _abandoned(target):
        with suppress(FileNotFoundError), _locked(found, fcntl.LOCK_EX) as idle:
            if idle:
                shutil.rmtree(found, ignore_errors=True)


def _name(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{secrets.token_hex(4)}"


def _made(target: Path) -> tuple[Path, int] | None:
    """A new directory and its lock; None where a save that sweeps took it for a leftover in between."""
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
    with suppress(OSError):  # without locks nobody sweeps
        fcntl.flock(lock, fcntl.LOCK_EX)
    if path.exists():
        return path, lock
    os.close(lock)
    return None


def _share_like(replaced: os.stat_result, path: Path) -> None:
    """Who may read and write what is to be replaced may do so at `path`. A group that cannot be given is another one
    there, and gets nothing."""
    mode = stat.S_IMODE(replaced.st_mode)
    if replaced.st_gid != path.stat().st_gid:
        try:
            os.chown(path, -1, replaced.st_gid)
        except PermissionError:
            mode &= ~(stat.S_IRWXG | stat.S_ISGID)
    os.chmod(path, mode)


def _abandoned(target: Path) -> list[Path]:
    """Directories of killed saves to `target`, the newest first, but for those that somebody else may have planted."""
    prefixes = tuple(f".{target.name}.{kind}-" for kind in (_NEW, _OLD))
    try:
        owners = {os.geteuid(), os.stat(target.parent).st_uid}
        with os.scandir(target.parent) as entries:
            named = [e for e in entries if e.name.startswith(prefixes) and e.is_dir(follow_symlinks=False)]
        found = [(e.stat().st_mtime, Path(e.path)) for e in named if e.stat().st_uid in owners]
        return [path for _, path in sorted(found, reverse=True) if _is_idle(path)]
    except OSError:  # another process puts one back or sweeps
        return []


def _is_idle(path: Path) -> bool:
    with _locked(path, fcntl.LOCK_SH) as idle:
        return idle


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[bool]:
    """Whether nobody writes to a directory, nor does while this is open; where there are no locks, somebody may."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(directory, kind | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(directory)
