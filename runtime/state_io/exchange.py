"""Putting one directory in the place of another: in one step where the system can, else so that one of the two is
always whole beside the place."""

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
    """Put `fresh` in the place of `target`, whose directory, if there is one, then has another name.

    Only renames, so that nothing can fail for lack of space. Other processes may do the same at once: one is last.
    """
    while not _is_installed(fresh, target):
        pass


def _is_installed(fresh: Path, target: Path) -> bool:
    """Whether it went well; else another process was quicker, and what is there is to be looked at anew."""
    try:
        if not os.path.lexists(target):
            return _is_moved(fresh, target)
        return exchange(fresh, target) or _step_aside(fresh, target)
    except FileNotFoundError:
        if not fresh.exists():
            raise
        return False


def _step_aside(fresh: Path, target: Path) -> bool:
    """The same in two steps. Who is killed between them leaves both directories under names that `leftovers` knows."""
    aside = old_name(target)
    try:
        os.rename(target, aside)
        return _is_moved(fresh, target)
    except BaseException:  # an interruption between the two, too
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise


def _is_moved(fresh: Path, target: Path) -> bool:
    """Whether there was nothing at `target`."""
    try:
        os.rename(fresh, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def exchange(one: Path, other: Path) -> bool:
    """Give each of two directories the name of the other, in one step. False where the system or the file system
    cannot; Linux can, with most of its own file systems.

    Raises OSError where it could, but for these directories, such as one that may not be written to.
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
