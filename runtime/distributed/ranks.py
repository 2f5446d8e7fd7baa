"""The processes that train one model together, on top of `torch.distributed`."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..isa.errors import REFUSALS, StateError
from ..isa.mesh import ONE_PROCESS, Mesh, names_of, taken_together
from ..isa.precision import ReduceDtype
from .collectives import Collectives
from .failures import Failure, raise_any
from .meeting import enter, group_along, host_group, launched, meeting, this_host
from .pulse import Pulse, of_process


@dataclass(frozen=True)
class Exchanges:
    """Digests of everything that determines what a program exchanges: `inside` with the ranks that share this process's
    batch, `between` with those that have other batches and the same layers; "" if nothing is exchanged.

    Pipeline ranks that share a batch run different programs, so their digests differ: they agree on `common` instead.
    """

    inside: str = ""
    between: str = ""
    common: str = ""


NOTHING = Exchanges()


@dataclass
class Clock:
    """Counts training steps and records, for messages, what this process is `doing` and what came before (`behind`,
    such as " behind 3 update(s)"). `due` are the exchanges that the ranks have yet to agree on."""

    step: int = 0
    doing: str = "beginning"
    behind: str = ""
    due: Exchanges = NOTHING

    def __str__(self) -> str:
        return self.doing + self.behind


@dataclass(frozen=True)
class Ranks:
    """The processes of a mesh, seen from one of them. A process that is alone exchanges nothing.

    Fields:
        mesh: all processes.
        rank: the number of this process.
        launched: False if the mesh has several processes and only this one was launched, to look at plans.
        on_this_host: how many of the processes share this host's memory, or will once they are launched.
        groups: the process groups, by the names of the mesh axes that they span.
        clock: the step and the activity of this process.
        reduce_dtype: the dtype that gradients are summed in.
        sharing: the host-side group of the ranks that share this one's batch, each with a part of the tensors or
            layers.
        alike: the host-side group of the ranks that have the same layers: all ranks, without a pipeline. In `sharing`
            and `alike`, ranks agree on what they are about to exchange.
        timeout: how long ranks wait for each other in an exchange.
        apart_group: the host-side group that `gather` uses instead of torch.distributed's default group, if any.
        pulse: tells which processes have died.
        channels: the process groups from one pipeline rank to another, by (source, destination).
    """

    mesh: Mesh = ONE_PROCESS
    rank: int = 0
    launched: bool = True
    on_this_host: int = 1
    groups: dict[tuple[str, ...], Any] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    reduce_dtype: ReduceDtype = "fp32"
    sharing: Any = None
    alike: Any = None
    timeout: timedelta = timedelta(seconds=300)
    apart_group: Any = None
    pulse: Pulse | None = None
    channels: dict[tuple[int, int], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, mesh_of: Callable[[int], Mesh], device: torch.device, reduce_dtype: ReduceDtype = "fp32",
           timeout_s: float = 300.0, per_host: int | None = None) -> "Ranks":  # fmt: skip
        """The ranks that were launched or, if only this process was, those that are planned for, `per_host` of them on
        a host (None: all). `mesh_of` returns the mesh for a number of launched processes, or raises ValueError if there
        is none. After `timeout_s` seconds in a collective the others are taken for dead. Raises StateError if they do
        not come."""
        count = launched()
        mesh = mesh_of(count)
        if count == 1:
            together = min(per_host or mesh.size, mesh.size)
            return cls(mesh, 0, launched=mesh.size == 1, on_this_host=together, reduce_dtype=reduce_dtype)
        if mesh.size != count:
            raise ValueError(
                f"world_size={mesh.size}, but {count} processes were launched; leave world_size out, or launch "
                f"with torchrun --nproc-per-node {mesh.size}"
            )
        timeout = timedelta(seconds=timeout_s)
        with meeting():
            if not dist.is_initialized():
                enter(device, timeout)
            sizes, names = tuple(axis.size for axis in mesh.axes), names_of(mesh.axes)
            made = init_device_mesh(device.type, sizes, mesh_dim_names=names)
            sharing = host_group(mesh, mesh.data_rank, timeout) if mesh.shares_batches else None
            alike = host_group(mesh, mesh.pipeline_rank, timeout)
        groups: dict[tuple[str, ...], Any] = {(name,): made.get_group(name) for name in names}
        ranks = cls(mesh, dist.get_rank(), groups=groups, reduce_dtype=reduce_dtype, sharing=sharing,
                    alike=alike, timeout=timeout, pulse=of_process())  # fmt: skip
        ranks.join_axes([names_of(mesh.batch_axes)], device)
        host = this_host()
        return replace(ranks, on_this_host=ranks.gather(host).count(host))

    def join_axes(self, several: Iterable[tuple[str, ...]], device: torch.device) -> None:
        """Creates the missing process groups, each over several axes together. All ranks call it, and each creates the
        groups that any of them asks for, in the same order."""
        asked = set(several)
        if self.mesh.pipeline_axes:  # pipeline ranks have different layers, and may ask for different groups
            asked = set().union(*self.gather(asked))
        for names in sorted(asked - {()}):
            if self.together and names not in self.groups:
                with meeting():
                    self.groups[names] = group_along(self.mesh, names, device)

    def apart(self) -> "Ranks":
        """The same processes with a separate host-side group for `gather`, so that a background thread can exchange
        objects while the process itself is in other exchanges. All ranks call it."""
        if not self.together:
            return self
        self.meet("the first save in the background")
        with meeting():
            group = host_group(self.mesh, lambda rank: 0, self.timeout)
        return replace(self, clock=Clock(self.clock.step), alike=None, apart_group=group)

    @property
    def size(self) -> int:
        return self.mesh.size

    @property
    def data_rank(self) -> int:
        """The index of this process's batch among the step's batches."""
        return self.mesh.data_rank(self.rank)

    @property
    def together(self) -> bool:
        """Whether there are others to exchange with."""
        return self.size > 1 and self.launched

    @property
    def collectives(self) -> Collectives:
        """The instructions that a sharded program communicates with."""
        return Collectives(self.mesh, self.rank, self.groups, self.call)

    def average_(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by its mean over the batches."""
        if self.together and self.mesh.data_size > 1:
            group = self.groups[names_of(self.mesh.batch_axes)]
            self.call(dist.all_reduce, tensor.div_(self.mesh.data_size), group=group)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by that of the first batch's rank."""
        if self.together and self.mesh.data_size > 1:
            group = self.groups[names_of(self.mesh.batch_axes)]
            self.call(dist.broadcast, tensor, group=group, group_src=0)
        return tensor

    def from_first_(self, tensor: Tensor, device: torch.device) -> None:
        """Replaces a tensor by rank 0's; `device` is where the ranks exchange."""
        if self.together:
            there = tensor.to(device)
            self.call(dist.broadcast, there, src=0)
            tensor.copy_(there)

    def from_first_alike_(self, tensor: Tensor) -> None:
        """Replaces a tensor by that of the first rank with the same layers, through the host."""
        if self.alike is not None:
            there = tensor.cpu()
            self.call(dist.broadcast, there, group=self.alike, group_src=0)
            tensor.copy_(there)

    def on_any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Which of the flags are set on any rank."""
        if not self.together:
            return flags
        self.meet("a backward of several outputs")
        found = torch.tensor(flags, dtype=torch.int32, device=device)
        self.call(dist.all_reduce, found, op=dist.ReduceOp.MAX)
        # If all flags are set here, the answer is known without waiting for the device.
        return flags if all(flags) else [flag != 0 for flag in found.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank."""
        found: list[Any] = [value] * self.size
        if self.together:
            self.meet("an exchange of objects, as in compiling, saving and loading")
            self.call(dist.all_gather_object, found, value, group=self.apart_group)
        return found

    def failures(self, error: Exception | None) -> dict[int, Failure | None]:
        """Every rank's failure, None for a rank without an error."""
        self.meet("agreeing on whether something failed")
        return dict(enumerate(self.gather(Failure.of(error))))

    def raise_alike(self, error: Exception | None) -> None:
        """If any rank has an error, raises on all: the error itself where it happened, elsewhere one that reports it,
        which is a StateError or, for a refusal, an error of the refusal's type."""
        raise_any(error, self.failures(error))

    @contextmanager
    def failing_alike(self) -> Iterator[None]:
        """If the body fails on any rank, all ranks raise, as in `raise_alike`. All ranks enter it."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.raise_alike(error)

    @contextmanager
    def refusing_alike(self) -> Iterator[None]:
        """If one rank of a pipeline has no room for its layers, or no way to run them, all ranks that would wait for it
        raise."""
        refusal = None
        try:
            yield
        except REFUSALS as error:
            refusal = error
        if self.mesh.pipeline_axes and self.launched:
            raise_any(refusal, self.told_by_sharing(Failure.of(refusal)))
        if refusal is not None:
            raise refusal

    def check_alike(self, what: str, digest: str, of_layers: str = "") -> None:
        """Raises StateError, naming the ranks that differ, unless `digest` is the same on all ranks and `of_layers` on
        those that have the same layers."""
        found = list(enumerate(self.gather((digest, of_layers))))
        firsts = {self.mesh.pipeline_rank(rank): (found[0][1][0], own) for rank, (_, own) in reversed(found)}
        others = [rank for rank, each in found if each != firsts[self.mesh.pipeline_rank(rank)]]
        if others:
            raise StateError(
                f"{what} of rank(s) {', '.join(map(str, others))} differs from that of rank 0; every rank must build "
                "the same model with the same options and call it with batches of the same shape"
            )

    def check_call(self, call: str) -> None:
        """Raises StateError on all ranks that share a batch if one of them is called in another way: each would wait
        for others that do something else. The check runs on the host, while the device continues."""
        self.clock.doing, self.clock.behind = "a call of the model", ""
        told = self._unlike(self.sharing, call, call)
        if told:
            others = [f"rank {rank} with {text}" for rank, text in told.items() if text != call]
            raise StateError(
                f"ranks that shard tensors or layers together were called in different ways: rank {self.rank} with "
                f"{call}, {', '.join(others)}; pass all of them the same batches, and evaluate on all of them"
            )

    def begin(self, what: str, exchanges: Exchanges, behind: str = "") -> None:
        """A program starts or resumes; `behind` tells how many updates came before. The ranks agree on it before its
        first collective, so a program without collectives may run on some of them only.

        In a pipeline they agree at once: each rank runs its own program, which may have no collective where others do.
        """
        self.clock.doing, self.clock.behind = what, behind
        self.clock.due = NOTHING if self.alike is None else exchanges
        if self.mesh.pipeline_axes:
            self._agree()

    def end(self) -> None:
        """The program sleeps or has ended."""
        self.clock.due = NOTHING

    def meet(self, what: str) -> None:
        """Raises StateError on all ranks if one of them is about to exchange something other than `what`."""
        self.begin(what, Exchanges(inside=what if self.sharing is not None else "", between=what))
        self._agree()

    def meet_alike(self, what: str) -> None:
        """Like `meet`, but only among the ranks that have the same layers."""
        self.begin(what, Exchanges(between=what))
        self._agree()

    def _agree(self) -> None:
        """Raises StateError on all ranks of a group if they are not about to do the same: a collective would wait for
        ranks that never join it, or be paired with another one."""
        what, exchanges, self.clock.due = str(self.clock), self.clock.due, NOTHING
        for group, digest in ((self.sharing, exchanges.inside), (self.alike, exchanges.between)):
            common = f"{self.clock.doing} {exchanges.common}"
            told = self._unlike(group, what, common, f"{self.clock.behind} {digest}") if digest else {}
            if len(set(told.values())) > 1:
                doing = "; ".join(f"rank {rank}: {text}" for rank, text in told.items())
                raise StateError(
                    f"ranks are out of step with each other. {doing}. All ranks must make the same calls in the same "
                    "order: training steps, saves, loads, and evaluations that return a loss, which is averaged over "
                    "all ranks (evaluations without labels may run on some ranks only)"
                )
            if told:
                raise StateError(
                    f"ranks {', '.join(map(str, told))} run different programs, which would exchange different data "
                    f"in {what}; every rank must build the same model with the same options and change it in the same "
                    "way. With ZeRO, pass all ranks batches of the same shape: the shape decides which weights fit on "
                    "the device and the number of rounds"
                )

    def _unlike(self, group: Any, told: str, common: str, of_layers: str = "") -> dict[int, str]:
        """What each member of a group tells, by rank, unless `common` is the same on all members and `of_layers` on
        those that have the same layers; {} if so."""
        members = dist.get_process_group_ranks(group)
        own = torch.tensor([zlib.crc32(text.encode()) for text in (common, of_layers)])
        found = [torch.empty_like(own) for _ in members]
        self._run(dist.all_gather, found, own, group=group)
        distinct = {(self.mesh.pipeline_rank(rank), *each.tolist()) for rank, each in zip(members, found, strict=True)}
        places, commons = ({each[i] for each in distinct} for i in (0, 1))
        if len(distinct) == len(places) and len(commons) == 1:
            return {}
        return dict(zip(members, self._tell(group, told), strict=True))

    def _tell(self, group: Any, value: Any) -> list[Any]:
        """Every group member's `value`, in group order."""
        found: list[Any] = [None] * dist.get_world_size(group)
        self._run(dist.all_gather_object, found, value, group=group)
        return found

    def told_by_sharing(self, value: Any) -> dict[int, Any]:
        """The `value` of each rank that shares this one's batch, by rank."""
        return dict(zip(dist.get_process_group_ranks(self.sharing), self._tell(self.sharing, value), strict=True))

    def check_batch(self, digest: str) -> None:
        """Raises StateError, naming the ranks that differ, if ranks that share a batch have different digests of it."""
        found = self._unlike(self.sharing, digest, digest)
        first = next(iter(found.values()), digest)
        others = [rank for rank, theirs in found.items() if theirs != first]
        if others:
            own = taken_together(names_of(self.mesh.batch_axes))
            raise StateError(
                f"rank(s) {', '.join(map(str, others))} called the model with a different batch from the ranks that "
                "they shard tensors or layers with; pass all of them the same one (geminifx.shard_dataloader does)"
                + (f", and different ones only to ranks at other positions along {own}" if own else "")
            )

    def share_randomness(self) -> None:
        """Seeds ranks that share a batch alike: what each of them computes whole must drop the same elements."""
        if self.sharing is not None:
            torch.manual_seed(self.gather(torch.initial_seed())[0] + self.data_rank)

    def check_launched(self) -> None:
        """Raises StateError if the other ranks were not launched."""
        if not self.launched:
            raise StateError(
                f"the model is compiled for {self.size} processes, but this is the only one: launch them with "
                f"torchrun --nproc-per-node {self.size} SCRIPT. The plan and the program can be inspected without "
                "launching"
            )

    def call(self, collective: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a collective of torch.distributed. Raises StateError if another process is lost or does something else;
        an error of this process alone is raised as it is."""
        self._agree()
        return self._run(collective, *args, **kwargs)

    def _run(self, collective: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            ended = [] if self.pulse is None else self.pulse.ended()
            if not ended and not _is_of_others(error):
                raise
            whom = f"rank(s) {', '.join(map(str, ended))}" if ended else "the others"
            why = "which ended; see its own error" if ended else (
                "one of them ended (see its own error) or is doing something else, such as a step that the others do "
                "not take"
            )  # fmt: skip
            raise StateError(
                f"rank {self.rank} of {self.size} lost {whom} in {collective.__name__} ({self.clock}), in step "
                f"{self.clock.step}: {why} ({error}). Restart all processes from the last checkpoint"
            ) from error


def _is_of_others(error: RuntimeError) -> bool:
    """Whether an exchange failed because of other processes, rather than on this one alone, such as for lack of memory.
    Errors of gloo have no type of their own, but name the place in its source."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


ALONE = Ranks()
"""This process alone."""
