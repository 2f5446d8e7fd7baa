"""How the processes that were launched meet, and the process groups that they make."""

import atexit
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..isa.errors import StateError, as_cause
from ..isa.mesh import Mesh

BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Another one at each start of a machine: names of hosts may be alike."""


def host_group(mesh: Mesh, kind: Callable[[int], int], timeout: timedelta) -> Any:
    """The group, on the host, of those that are of the same kind as this process."""
    by_kind: dict[int, list[int]] = {}
    for rank in range(mesh.size):
        by_kind.setdefault(kind(rank), []).append(rank)
    group, _ = dist.new_subgroups_by_enumeration(list(by_kind.values()), timeout=timeout, backend="gloo")
    return group


@contextmanager
def meeting() -> Iterator[None]:
    """While process groups are made. Raises StateError where another process does not come to that."""
    try:
        yield
    except RuntimeError as error:
        raise StateError(
            "the processes did not meet: one of them has ended, see its own error, or came too late for timeout_s "
            f"({error}). Start all of them again"
        ) from as_cause(error)


def launched() -> int:
    """How many processes were started together, or have met already."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def this_host() -> tuple[str, str]:
    """What tells this process's host from others, and from other containers, which have memory of their own."""
    try:
        boot = BOOT.read_text().strip()
    except OSError:  # not Linux
        boot = ""
    return platform.node(), boot


def enter(device: torch.device, timeout: timedelta) -> None:
    """Meet the others that were launched."""
    if device.type == "cuda":
        # Kernels of several communicators that wait for each other on the same device may lock each other out, unless
        # NCCL runs them one behind the other, in the order in which they were started: the program's.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        dist.init_process_group("nccl", timeout=timeout, device_id=device, **_meeting_place(timeout))
    else:
        dist.init_process_group("gloo", timeout=timeout, **_meeting_place(timeout))
        atexit.register(_leave)


def _meeting_place(timeout: timedelta) -> dict[str, Any]:
    """Where `init_process_group` finds the others: in the store of who launched them, by names of this start alone.
    torchrun keeps one store for all of its starts, and what is there from the last leads to processes that died."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"start {start}", store), "rank": rank, "world_size": size}


def group_along(mesh: Mesh, names: tuple[str, ...], device: torch.device) -> Any:
    """This process's group of those along several axes, wherever these stand in the mesh. torch.distributed numbers its
    members by their ranks, as `Mesh.number` does."""
    sizes, places = [axis.size for axis in mesh.axes], range(len(mesh.axes))
    along = [i for i in places if mesh.axes[i].name in names]
    ranks = torch.arange(mesh.size).view(sizes).permute(*(i for i in places if i not in along), *along)
    members = mesh.ranks_over(names)
    if members == mesh.size:
        return DeviceMesh(device.type, ranks.flatten(), mesh_dim_names=("members",)).get_group("members")
    return DeviceMesh(device.type, ranks.reshape(-1, members), mesh_dim_names=("rest", "members")).get_group("members")


def _leave() -> None:
    """Join gloo's threads: the C++ runtime aborts a process that ends while they run."""
    if dist.is_initialized():
        dist.destroy_process_group()
