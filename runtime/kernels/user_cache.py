"""The user's cache: a folder that nobody else can write to, and files that appear in it whole or not at all."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_directory() -> Path:
    """Returns the folder for what is kept between runs: `geminifx` in XDG_CACHE_HOME or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "geminifx"


def usable_cache() -> Path | None:
    """Returns that folder, created if it is missing; None if it cannot be written or others can write to it."""
    directory = cache_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory if os.access(directory, os.W_OK) and is_private(directory) else None
    except OSError:
        return None


def is_private(path: Path) -> bool:
    """Returns whether only this user, or root, can write to `path` or replace it."""
    own = path.stat()
    if own.st_uid != os.geteuid() or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    above = [parent.stat().st_mode for each in (path.absolute(), path.resolve()) for parent in each.parents]
    # A group may be the user's own. With the sticky bit, others cannot rename what is not theirs.
    return not any(mode & stat.S_IWOTH and not mode & stat.S_ISVTX for mode in above)


@contextmanager
def appearing(target: Path, mode: int) -> Iterator[Path]:
    """Yields the path of a temporary file to write, which atomically replaces `target` when the block ends."""
    handle, name = tempfile.mkstemp(prefix=target.stem, suffix=".tmp", dir=target.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(mode)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
