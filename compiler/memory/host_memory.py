"""How much of the host's memory this process may use: the machine's, or what its container is limited to."""

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""The files with a group's limit and usage, in version 2 and version 1 of control groups."""


def host_memory(groups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> tuple[int, int]:
    """Total and free bytes, within the limits of all control groups that this process is in.

    The kernel kills a process whose group exceeds its limit, however much memory the machine has.
    """
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for folder in _folders(groups, membership):
        for limit_file, used_file in _FILES:
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and limit < machine.total:
                total = min(total, limit)
                free = min(free, max(0, limit - ((used or 0) - _reclaimable(folder))))
    return total, free


def _folders(groups: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups, and of the groups around them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or "memory" in controllers.split(","):
            root = groups if number == "0" else groups / "memory"
            inside = Path(path.lstrip("/"))
            yield from dict.fromkeys([root / inside, *(root / parent for parent in inside.parents), root])


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file, or no limit in it."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(folder: Path) -> int:
    """The bytes of a group's usage that are page cache, which the kernel frees on demand."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))
