"""The processes that train one model together, by `torch.distributed`."""

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
    """Digests of all that decides what is exchanged: `inside` with those that share this process's batch, `between`
    with those that have other batches and the same layers; "" for nothing.

    Where those that share a batch run other layers, each other programs, theirs differ, and `common` is what they have
    alike.
    """

    inside: str = ""
    between: str = ""
    common: str = ""


NOTHING = Exchanges()


@dataclass
class Clock:
    """Counts training steps, and has what this process is `doing`, and `behind` what, for messages. `due` is what that
    exchanges, as long as the ranks have not agreed on it."""

    step: int = 0
    doing: str = "beginning"
    behind: str = ""
    due: Exchanges = NOTHING

    def __str__(self) -> str:
        return self.doing + self.behind


@dataclass(frozen=True)
class Ranks:
    """The processes of `mesh`, of which this is number `rank`. Alone, nothing is exchanged; `launched` is False where
    more than one is planned for and only one is there. `groups` are the process groups of the mesh's axes, and of those
    that are taken together, by the axes' names; `reduce_dtype` is what gradients are added up in. `sharing` is the
    group, on the host, of those that share this one's batch, each with a part of the tensors or of the layers, `alike`
    the one of those that have the same layers, which are all without pipeline: in these they agree on what they are
    about to exchange. `apart_group` is the one for what they tell each other, where that is not torch.distributed's
    own, `channels` are those from one rank of a pipeline to another. In an exchange they wait for each other for
    `timeout`, and by the `pulse` they tell who has died. `on_this_host` of them share this machine's memory, or will
    where they are planned for."""

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
        """The ranks that were launched, or those that are planned for, `per_host` of them on a host, or all; `mesh_of`
        tells the mesh of so many launched ones, and raises ValueError where there is none. After `timeout_s` in a
        collective the others are taken for dead. Raises StateError where they do not come."""
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
        """Make the process groups of several axes taken together, as far as they are not there. All ranks call it, and
        make those that any of them asks for, in one order everywhere."""
        asked = set(several)
        if self.mesh.pipeline_axes:  # each has layers of its own
            asked = set().union(*self.gather(asked))
        for names in sorted(asked - {()}):
            if self.together and names not in self.groups:
                with meeting():
                    self.groups[names] = group_along(self.mesh, names, device)

    def apart(self) -> "Ranks":
        """The same processes, which tell each other what they do over a group of its own, on the host: a thread may,
        whatever its process exchanges meanwhile. All ranks call it."""
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
        """Which of the step's batches is this process's."""
        return self.mesh.data_rank(self.rank)

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

    def from_first_alike_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the first of those that have the same layers, by way of the host."""
        if self.alike is not None:
            there = tensor.cpu()
            self.call(dist.broadcast, there, group=self.alike, group_src=0)
            tensor.copy_(there)

    def on_any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Which of them are set on any rank."""
        if not self.together:
            return flags
        self.meet("a backward of several outputs")
        found = torch.tensor(flags, dtype=torch.int32, device=device)
        self.call(dist.all_reduce, found, op=dist.ReduceOp.MAX)
        # Whoever knows the answer already does not wait for the device.
        return flags if all(flags) else [flag != 0 for flag in found.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """What every rank has for `value`."""
        found: list[Any] = [value] * self.size
        if self.together:
            self.meet("an exchange of objects, as compiling, saving and loading make")
            self.call(dist.all_gather_object, found, value, group=self.apart_group)
        return found

    def failures(self, error: Exception | None) -> dict[int, Failure | None]:
        """What each rank tells of its error, if it has one."""
        self.meet("telling each other whether something failed")
        return dict(enumerate(self.gather(Failure.of(error))))

    def raise_alike(self, error: Exception | None) -> None:
        """Where any rank has an error, raise: there the error itself, elsewhere one that tells it: a StateError, or for
        a refusal one of its kind, which all then meet alike."""
        raise_any(error, self.failures(error))

    @contextmanager
    def failing_alike(self) -> Iterator[None]:
        """Where what all ranks do within fails on any of them, all raise, as `raise_alike` does."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.raise_alike(error)

    @contextmanager
    def refusing_alike(self) -> Iterator[None]:
        """Where one rank of a pipeline finds no room for its layers, or no way to run them, all those raise that would
        wait for it."""
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
        """Raises StateError where the ranks' digests differ, naming those that do. Those `of_layers` are alike where
        these are the same."""
        found = list(enumerate(self.gather((digest, of_layers))))
        firsts = {self.mesh.pipeline_rank(rank): (found[0][1][0], own) for rank, (_, own) in reversed(found)}
        others = [rank for rank, each in found if each != firsts[self.mesh.pipeline_rank(rank)]]
        if others:
            raise StateError(
                f"{what} of rank(s) {', '.join(map(str, others))} differs from that of rank 0; every rank must build "
                "the same model, with the same options, and call it with batches of one shape"
            )

    def check_call(self, call: str) -> None:
        """Raises StateError, on all ranks that share tensors, where one of them is called in another way: each would
        wait for others that do something else. It is the host's to find out; the device goes on meanwhile."""
        self.clock.doing, self.clock.behind = "a call of the model", ""
        told = self._unlike(self.sharing, call, call)
        if told:
            others = [f"rank {rank} with {text}" for rank, text in told.items() if text != call]
            raise StateError(
                f"ranks that shard tensors or layers together were called in different ways: rank {self.rank} with "
                f"{call}, {', '.join(others)}; give all of them the same batches, and let all of them evaluate"
            )

    def begin(self, what: str, exchanges: Exchanges, behind: str = "") -> None:
        """A program starts to run, or goes on, `behind` so many others: before its first collective the ranks are to
        agree on it. One that comes to none may be run by some of them.

        In a pipeline they agree at once: there each runs a program of its own, which may come to none where others do.
        """
        self.clock.doing, self.clock.behind = what, behind
        self.clock.due = NOTHING if self.alike is None else exchanges
        if self.mesh.pipeline_axes:
            self._agree()

    def end(self) -> None:
        """It sleeps or has ended."""
        self.clock.due = NOTHING

    def meet(self, what: str) -> None:
        """Raises StateError, on all ranks, where one of them is about to exchange something else than this."""
        self.begin(what, Exchanges(inside=what if self.sharing is not None else "", between=what))
        self._agree()

    def meet_alike(self, what: str) -> None:
        """As `meet`, of those alone that have the same layers."""
        self.begin(what, Exchanges(between=what))
        self._agree()

    def _agree(self) -> None:
        """Raises StateError, on all ranks that exchange, where they do not do the same: a collective would wait for
        others that never come to it, or meet another one."""
        what, exchanges, self.clock.due = str(self.clock), self.clock.due, NOTHING
        for group, digest in ((self.sharing, exchanges.inside), (self.alike, exchanges.between)):
            common = f"{self.clock.doing} {exchanges.common}"
            told = self._unlike(group, what, common, f"{self.clock.behind} {digest}") if digest else {}
            if len(set(told.values())) > 1:
                doing = "; ".join(f"rank {rank}: {text}" for rank, text in told.items())
                raise StateError(
                    f"ranks came to exchange different things. {doing}. All of them must make the same calls in "
                    "the same order: training steps, saves, loads, and evaluations that return a loss, which is the "
                    "mean over all (one without labels may be made by some)"
                )
            if told:
                raise StateError(
                    f"ranks {', '.join(map(str, told))} run different programs: in {what} they would not exchange the "
                    "same; every rank must build the same model, with the same options, and change it alike. Under "
                    "ZeRO with a tight budget, where batches of other shapes leave room for other weights, give all "
                    "ranks batches of one shape"
                )

    def _unlike(self, group: Any, told: str, common: str, of_layers: str = "") -> dict[int, str]:
        """What each member of a group tells, where what they have in `common` is not the same for all of them, or what
        is `of_layers` for those that have the same ones."""
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
        """What every member of a group has for `value`."""
        found: list[Any] = [None] * dist.get_world_size(group)
        self._run(dist.all_gather_object, found, value, group=group)
        return found

    def told_by_sharing(self, value: Any) -> dict[int, Any]:
        """What each rank that shares this one's batch has for `value`."""
        return dict(zip(dist.get_process_group_ranks(self.sharing), self._tell(self.sharing, value), strict=True))

    def check_batch(self, digest: str) -> None:
        """Raises StateError where ranks that share a batch have other digests of it, naming those that do."""
        found = self._unlike(self.sharing, digest, digest)
        first = next(iter(found.values()), digest)
        others = [rank for rank, theirs in found.items() if theirs != first]
        if others:
            own = taken_together(names_of(self.mesh.batch_axes))
            raise StateError(
                f"rank(s) {', '.join(map(str, others))} called the model with another batch than the ranks that they "
                "shard tensors or layers with; give all of them the same one (geminifx.shard_dataloader does)"
                + (f", and other ones only to ranks elsewhere along {own}" if own else "")
            )

    def share_randomness(self) -> None:
        """Seed the ranks that share a batch alike: what each of them computes whole must drop the same elements."""
        if self.sharing is not None:
            torch.manual_seed(self.gather(torch.initial_seed())[0] + self.data_rank)

    def check_launched(self) -> None:
        """Raises StateError where the other ranks are missing."""
        if not self.launched:
            raise StateError(
                f"the model is compiled for {self.size} processes, of which this is the only one: launch them with "
                f"torchrun --nproc-per-node {self.size} SCRIPT. Plan and program can be looked at without"
            )

    def call(self, collective: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a collective of torch.distributed. Raises StateError where another process is lost, or does something
        else, and what it raises where it fails on this one."""
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
            why = "which ended, see its own error" if ended else (
                "one of them has died, see its own error, or does something else, such as a step that the others do "
                "not take"
            )  # fmt: skip
            raise StateError(
                f"rank {self.rank} of {self.size} lost {whom} in {collective.__name__} ({self.clock}), in step "
                f"{self.clock.step}: {why} ({error}). Restart all from the last checkpoint"
            ) from error


def _is_of_others(error: RuntimeError) -> bool:
    """Whether an exchange failed for want of others, and not on this process alone, as for want of memory. Errors of
    gloo have no type of their own, and tell the place in its source."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


ALONE = Ranks()
"""This process and no others."""
