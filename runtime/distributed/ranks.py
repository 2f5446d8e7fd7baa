"""The processes that train one model together, by `torch.distributed`."""

import atexit
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..isa.errors import StateError
from ..isa.mesh import ONE_PROCESS, Mesh, names_of, taken_together
from ..isa.precision import ReduceDtype
from .collectives import Collectives


@dataclass
class Clock:
    """Counts training steps, for messages."""

    step: int = 0


@dataclass(frozen=True)
class Ranks:
    """The processes of `mesh`, of which this is number `rank`. Alone, nothing is exchanged; `launched` is False where
    more than one is planned for and only one is there. `groups` are the process groups of the mesh's axes, and of those
    that are taken together, by the axes' names; `reduce_dtype` is what gradients are added up in. `sharing` is the
    group, on the host, of those that share this one's batch and tensors; `apart_group` the one of all, for what they
    tell each other, where that is not torch.distributed's own. In an exchange they wait for each other for
    `timeout_s`."""

    mesh: Mesh = ONE_PROCESS
    rank: int = 0
    launched: bool = True
    groups: dict[tuple[str, ...], Any] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    reduce_dtype: ReduceDtype = "fp32"
    sharing: Any = None
    timeout_s: float = 300.0
    apart_group: Any = None

    @classmethod
    def of(cls, mesh_of: Callable[[int], Mesh], device: torch.device, reduce_dtype: ReduceDtype = "fp32",
           timeout_s: float = 300.0) -> "Ranks":  # fmt: skip
        """The ranks that torchrun launched, or those that are planned for; `mesh_of` tells the mesh of so many
        launched ones, and raises ValueError where there is none. After `timeout_s` in a collective the others are
        taken for dead."""
        launched = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        mesh = mesh_of(launched)
        if launched == 1:
            return cls(mesh, 0, launched=mesh.size == 1, reduce_dtype=reduce_dtype)
        if mesh.size != launched:
            raise ValueError(
                f"world_size={mesh.size}, but {launched} processes were launched; leave world_size out, or launch "
                f"with torchrun --nproc-per-node {mesh.size}"
            )
        if not dist.is_initialized():
            on_cuda = device.type == "cuda"
            dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(seconds=timeout_s),
                                    device_id=device if on_cuda else None)  # fmt: skip
            if not on_cuda:
                atexit.register(_leave)
        made = init_device_mesh(device.type, tuple(axis.size for axis in mesh.axes), mesh_dim_names=names_of(mesh.axes))
        groups: dict[tuple[str, ...], Any] = {(name,): made.get_group(name) for name in names_of(mesh.axes)}
        ranks = cls(mesh, dist.get_rank(), groups=groups, reduce_dtype=reduce_dtype, timeout_s=timeout_s,
                    sharing=_sharing(mesh, timedelta(seconds=timeout_s)))  # fmt: skip
        ranks.join_axes([names_of(mesh.batch_axes)], device)
        return ranks

    def join_axes(self, several: Iterable[tuple[str, ...]], device: torch.device) -> None:
        """Make the process groups of several axes taken together, as far as they are not there. All ranks call it with
        the same ones, whose groups are made in one order everywhere."""
        for names in sorted(set(several) - {()}):
            if self.together and names not in self.groups:
                self.groups[names] = _group(self.mesh, names, device)

    def apart(self) -> "Ranks":
        """The same processes, which tell each other what they do over a group of its own, on the host: a thread may,
        whatever its process exchanges meanwhile. All ranks call it."""
        if not self.together:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        return replace(self, clock=replace(self.clock), apart_group=group)

    @property
    def size(self) -> int:
        return self.mesh.size

    @property
    def data_rank(self) -> int:
        """Which of the step's batches is this process's."""
        return self.mesh.data_rank(self.rank)

    @property
    def on_this_host(self) -> int:
        """How many of the ranks share this machine's memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.together else 1

    @property
    def together(self) -> bool:
        """Whether there are others to exchange with."""
        return self.size > 1 and self.launched

    @property
    def collectives(self) -> Collectives:
        """What a sharded program exchanges with."""
        return Collectives(self.mesh, self.rank, self.groups, self.call)

    def average_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its mean over the batches."""
        if self.together and self.mesh.data_size > 1:
            group = self.groups[names_of(self.mesh.batch_axes)]
            self.call(dist.all_reduce, tensor.div_(self.mesh.data_size), group=group)
        return tensor

    def from_first_(self, tensor: Tensor, device: torch.device) -> None:
        """Replace a tensor by that of rank 0, by way of `device`, where the ranks exchange."""
        if self.together:
            there = tensor.to(device)
            self.call(dist.broadcast, there, src=0)
            tensor.copy_(there)

    def on_any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Which of them are set on any rank."""
        if not self.together:
            return flags
        found = torch.tensor(flags, dtype=torch.int32, device=device)
        self.call(dist.all_reduce, found, op=dist.ReduceOp.MAX)
        # Whoever knows the answer already does not wait for the device.
        return flags if all(flags) else [flag != 0 for flag in found.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """What every rank has for `value`."""
        found: list[Any] = [value] * self.size
        if self.together:
            self.call(dist.all_gather_object, found, value, group=self.apart_group)
        return found

    def raise_alike(self, error: Exception | None) -> None:
        """Where any rank has an error, raise: there the error itself, elsewhere a StateError that tells it."""
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = {rank: text for rank, text in enumerate(told) if text is not None}
        if failed:
            raise StateError("; ".join(f"rank {rank} failed with {text}" for rank, text in failed.items()))

    def check_alike(self, what: str, digest: str) -> None:
        """Raises StateError where the ranks' digests differ, naming those that do."""
        digests = self.gather(digest)
        others = [rank for rank, found in enumerate(digests) if found != digests[0]]
        if others:
            raise StateError(
                f"{what} of rank(s) {', '.join(map(str, others))} differs from that of rank 0; every rank must build "
                "the same model, with the same options, and call it with batches of one shape"
            )

    def check_call(self, call: str) -> None:
        """Raises StateError, on all ranks that share tensors, where one of them is called in another way: each would
        wait for others that do something else. It is the host's to find out; the device goes on meanwhile."""
        members = dist.get_process_group_ranks(self.sharing)
        own = torch.tensor(zlib.crc32(call.encode()))
        found = [torch.empty_like(own) for _ in members]
        self.call(dist.all_gather, found, own, group=self.sharing)
        if any(one != own for one in found):
            told: list[Any] = [None for _ in members]
            self.call(dist.all_gather_object, told, call, group=self.sharing)
            others = [f"rank {rank} with {text}" for rank, text in zip(members, told, strict=True) if text != call]
            raise StateError(
                f"ranks that shard tensors together were called in different ways: rank {self.rank} with {call}, "
                f"{', '.join(others)}; give all of them the same batches, and let all of them evaluate"
            )

    def check_batch(self, digest: str) -> None:
        """Raises StateError where ranks that share a batch have other digests of it, naming those that do."""
        first: dict[int, str] = {}
        found = enumerate(self.gather((self.data_rank, digest)))
        others = [rank for rank, (batch, theirs) in found if first.setdefault(batch, theirs) != theirs]
        if others:
            own = taken_together(names_of(self.mesh.batch_axes))
            raise StateError(
                f"rank(s) {', '.join(map(str, others))} called the model with another batch than the ranks that they "
                "shard tensors with; give all of them the same one (geminifx.shard_dataloader does)"
                + (f", and other ones only to ranks elsewhere along {own}" if own else "")
            )

    def share_randomness(self) -> None:
        """Seed the ranks that share a batch alike: what each of them computes whole must drop the same elements."""
        if self.together and self.mesh.tensor_axes:
            torch.manual_seed(self.gather(torch.initial_seed())[0] + self.data_rank)

    def check_launched(self) -> None:
        """Raises StateError where the other ranks are missing."""
        if not self.launched:
            raise StateError(
                f"the model is compiled for {self.size} processes, of which this is the only one: launch them with "
                f"torchrun --nproc-per-node {self.size} SCRIPT. Plan and program can be looked at without"
            )

    def call(self, collective: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a collective of torch.distributed. Raises StateError where another process is lost."""
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            raise StateError(
                f"rank {self.rank} of {self.size} lost the others in {collective.__name__}, in step {self.clock.step}: "
                "one of them has died, see its own error, or does something else, such as a call with a batch of "
                f"another shape or a step that the others do not take ({error}). Restart all from the last checkpoint"
            ) from error


def _sharing(mesh: Mesh, timeout: timedelta) -> Any:
    """The group of those that share this process's batch; None where tensors are whole."""
    if not mesh.tensor_axes:
        return None
    by_batch: dict[int, list[int]] = {}
    for rank in range(mesh.size):
        by_batch.setdefault(mesh.data_rank(rank), []).append(rank)
    group, _ = dist.new_subgroups_by_enumeration(list(by_batch.values()), timeout=timeout, backend="gloo")
    return group


def _group(mesh: Mesh, names: tuple[str, ...], device: torch.device) -> Any:
    """This process's group of those along several axes, wherever these stand in the mesh. torch.distributed numbers its
    members by their ranks, as `Mesh.number` does."""
    sizes, places = [axis.size for axis in mesh.axes], range(len(mesh.axes))
    along = [i for i in places if mesh.axes[i].name in names]
    ranks = torch.arange(mesh.size).view(sizes).permute(*(i for i in places if i not in along), *along)
    members = mesh.ranks_over(names)
    if members == mesh.size:
        return DeviceMesh(device.type, ranks.flatten(), mesh_dim_names=("members",)).get_group("members")
    return DeviceMesh(device.type, ranks.reshape(-1, members), mesh_dim_names=("rest", "members")).get_group("members")


ALONE = Ranks()
"""This process and no others."""


def _leave() -> None:
    """Join gloo's threads: the C++ runtime aborts a process that ends while they run."""
    if dist.is_initialized():
        dist.destroy_process_group()
