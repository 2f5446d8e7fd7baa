"""Replaces one directory with another: in one step if the system can, else such that one of the two is always whole,
beside the target."""

import ctypes
import errno
import os
import sys
from pathlib import Path

from .leftovers import old_name

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def install(fresh: Path, target: Path) -> None:
    """Moves `fresh` to `target`; a directory already there ends up under another name.

    Uses only renames, so that nothing can fail for lack of space. If several processes do so at once, the last one
    wins.
    """
    while not _is_installed(fresh, target):
        pass


def _is_installed(fresh: Path, target: Path) -> bool:
    """Tries once. Returns False if another process was faster, and the situation must be looked at again."""
    try:
        if not os.path.lexists(target):
            return _is_moved(fresh, target)
        return exchange(fresh, target) or _step_aside(fresh, target)
    except FileNotFoundError:
        if not fresh.exists():
            raise
        return False


def _step_aside(fresh: Path, target: Path) -> bool:
    """Replaces `target` in two steps. If the process is killed between them, both directories are left under names that
    `leftovers` finds."""
    aside = old_name(target)
    try:
        os.rename(target, aside)
        return _is_moved(fresh, target)
    except BaseException:  # also an interruption between the two steps
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise


def _is_moved(fresh: Path, target: Path) -> bool:
    """Renames `fresh` to `target`; False if there is something already."""
    try:
        os.rename(fresh, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def exchange(one: Path, other: Path) -> bool:
    """Swaps two directories in one step. Returns False if the system or the file system cannot; Linux can, on most of
    its file systems.

    Raises OSError if it fails for these directories in particular, for example because one is read-only.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
