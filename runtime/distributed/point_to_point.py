"""Messages between the ranks of a pipeline: what one sends another receives, in the order in which it was sent."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..isa.errors import StateError
from ..isa.mesh import names_of
from .collectives import waiting
from .meeting import meeting
from .ranks import Ranks

Channel = tuple[int, int]
"""From one rank of the pipeline to another one."""


class Messages:
    """The instructions that send and receive, and what is on its way.

    Each pair of ranks that exchange has a process group for each direction, so that neither waits for the other, nor
    one pair for another; those that nobody knew of before go through the group of the pipeline's axis.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.place = ranks.mesh.pipeline_rank(ranks.rank)
        self._leaving: dict[int, deque[tuple[Callable[[], None], Tensor]]] = defaultdict(deque)  # by where to
        self._coming: dict[int, tuple[Callable[[], None], Tensor, tuple[int, ...]]] = {}
        self._exchanged = self._is_broken = False  # since the program was begun; for good

    def begin(self) -> None:
        """A program begins, or goes on behind its turn, on all ranks, which have received all that was sent before.

        Raises StateError where a step failed between messages, since what is still under way would be taken for others,
        and where another process is lost.
        """
        if self._is_broken:
            raise StateError(
                "a step of the pipeline failed while its ranks exchanged values, some of which may still be under "
                "way: start all ranks again from the last checkpoint"
            )
        self._exchanged = False

    def send(self, value: Tensor, to: int) -> None:
        """The value may be let go of: what is on its way is kept here."""
        self._exchanged = True
        moving = value.contiguous()
        group, number = self._group(self.place, to)
        work = self.ranks.call(dist.isend, moving, group=group, group_dst=number(to))
        self._leaving[to].append((waiting(work, dist.isend), moving))

    def finish_send(self, value: Tensor, to: int) -> None:
        """The oldest of what is on its way to a rank, which is this value, is there. Blocks the host where the device
        is one, and else what is launched behind it."""
        wait, _ = self._leaving[to].popleft()
        self.ranks.call(wait)

    def start_receive(self, shape: list[int], stride: list[int], dtype: torch.dtype, source: int,
                      device: torch.device) -> Tensor:  # fmt: skip
        """Nobody may read it before `finish_receive`."""
        self._exchanged = True
        coming = torch.empty(shape, dtype=dtype, device=device)
        group, number = self._group(source, self.place)
        work = self.ranks.call(dist.irecv, coming, group=group, group_src=number(source))
        self._coming[id(coming)] = waiting(work, dist.irecv), coming, tuple(stride)
        return coming

    def finish_receive(self, coming: Tensor) -> Tensor:
        """Blocks as `finish_send` does."""
        wait, come, stride = self._coming.pop(id(coming))
        self.ranks.call(wait)
        if come.stride() == stride:
            return come
        return torch.empty_strided(come.shape, stride, dtype=come.dtype, device=come.device).copy_(come)

    def abandon(self) -> None:
        """Of a step that failed: who would send or receive what is under way may be lost. Its memory stays as long as
        this process does, for messages may still write to it."""
        self._is_broken |= self._exchanged

    def _group(self, source: int, to: int) -> tuple[Any, Callable[[int], int]]:
        """The process group of a channel, and which of its members a rank of the pipeline is."""
        channel = self.ranks.channels.get((source, to))
        if channel is None:
            return self.ranks.groups[names_of(self.ranks.mesh.pipeline_axes)], lambda place: place
        return channel, sorted((source, to)).index


def open_channels(ranks: Ranks, asked: Iterable[Channel]) -> None:
    """Make the process groups of channels, as far as they are not there. All ranks call it, and make those that any of
    them asks for, in one order everywhere."""
    if not (ranks.mesh.pipeline_axes and ranks.together):
        return
    every = set[Channel]().union(*ranks.gather(set(asked)))
    for channel in sorted(every - ranks.channels.keys()):
        columns: dict[tuple[int, ...], list[int]] = {}
        for rank in range(ranks.mesh.size):
            columns.setdefault(_column(ranks, rank), []).append(rank)
        with meeting():
            for column, members in columns.items():
                ends = [rank for rank in members if ranks.mesh.pipeline_rank(rank) in channel]
                group = dist.new_group(ends, timeout=ranks.timeout)
                if column == _column(ranks, ranks.rank):  # who is no end of it keeps in mind that it is there
                    ranks.channels[channel] = group


def _column(ranks: Ranks, rank: int) -> tuple[int, ...]:
    """Where a process stands on the other axes: those of one column are a pipeline."""
    axes = (axis for axis in ranks.mesh.axes if axis.kind != "pipeline")
    return tuple(ranks.mesh.coordinate(rank, axis.name) for axis in axes)


def check_messages(ranks: Ranks, sent: Mapping[int, str], received: Mapping[int, str]) -> None:
    """Raises StateError, on all ranks of a pipeline, where one waits for other messages than another one sends it. Both
    are told by the other's place along the pipeline, as they follow one another."""
    if not ranks.mesh.pipeline_axes:
        return
    column, told = _column(ranks, ranks.rank), ranks.told_by_sharing((dict(sent), dict(received)))
    mine = {ranks.mesh.pipeline_rank(rank): each for rank, each in told.items() if _column(ranks, rank) == column}
    for source, (leaving, _) in mine.items():
        for to, (_, coming) in mine.items():
            if leaving.get(to, "") != coming.get(source, ""):
                raise StateError(
                    f"rank {source} of the pipeline sends rank {to} other messages than that one waits for; all ranks "
                    "must build the same model, with the same options, and recompute blocks alike where stages meet"
                )
