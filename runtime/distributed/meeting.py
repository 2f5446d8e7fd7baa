"""Initialises torch.distributed, and creates process groups."""

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
"""Differs between boots, and so between hosts of the same name."""


def host_group(mesh: Mesh, kind: Callable[[int], int], timeout: timedelta) -> Any:
    """The host-side (gloo) group of all ranks with the same `kind` as this process. All ranks call it."""
    by_kind: dict[int, list[int]] = {}
    for rank in range(mesh.size):
        by_kind.setdefault(kind(rank), []).append(rank)
    group, _ = dist.new_subgroups_by_enumeration(list(by_kind.values()), timeout=timeout, backend="gloo")
    return group


@contextmanager
def meeting() -> Iterator[None]:
    """Context in which process groups are created. Raises StateError if another process does not join."""
    try:
        yield
    except RuntimeError as error:
        raise StateError(
            "the processes could not connect: one of them ended (see its own error) or did not start within timeout_s "
            f"({error}). Start all of them again"
        ) from as_cause(error)


def launched() -> int:
    """How many processes were launched together, or have initialised torch.distributed already."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def this_host() -> tuple[str, str]:
    """Identifies this process's host among others, and its container, which has memory of its own."""
    try:
        boot = BOOT.read_text().strip()
    except OSError:  # not Linux
        boot = ""
    return platform.node(), boot


def enter(device: torch.device, timeout: timedelta) -> None:
    """Initialises torch.distributed with the other launched processes."""
    if device.type == "cuda":
        # Kernels of several communicators that wait for each other on the same device may deadlock, unless NCCL runs
        # them one after the other, in the order in which they were started: the program's.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        dist.init_process_group("nccl", timeout=timeout, device_id=device, **_meeting_place(timeout))
    else:
        dist.init_process_group("gloo", timeout=timeout, **_meeting_place(timeout))
        atexit.register(_leave)


def _meeting_place(timeout: timedelta) -> dict[str, Any]:
    """Arguments of `init_process_group`: the launcher's store, under a prefix for this start alone. torchrun keeps one
    store across restarts, and keys left from the last start lead to processes that died."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"start {start}", store), "rank": rank, "world_size": size}


def group_along(mesh: Mesh, names: tuple[str, ...], device: torch.device) -> Any:
    """This process's group along several axes, wherever they are in the mesh. torch.distributed numbers its members by
    rank, as `Mesh.number` does."""
    sizes, places = [axis.size for axis in mesh.axes], range(len(mesh.axes))
    along = [i for i in places if mesh.axes[i].name in names]
    ranks = torch.arange(mesh.size).view(sizes).permute(*(i for i in places if i not in along), *along)
    members = mesh.ranks_over(names)
    if members == mesh.size:
        return DeviceMesh(device.type, ranks.flatten(), mesh_dim_names=("members",)).get_group("members")
    return DeviceMesh(device.type, ranks.reshape(-1, members), mesh_dim_names=("rest", "members")).get_group("members")


def _leave() -> None:
    """Joins gloo's threads: the C++ runtime aborts a process that exits while they run."""
    if dist.is_initialized():
        dist.destroy_process_group()
