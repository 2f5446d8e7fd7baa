"""Messages between pipeline ranks, received in the order in which they were sent."""

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
"""(source, destination), as pipeline ranks."""


class Messages:
    """The instructions that send and receive, and the messages under way.

    Each pair of ranks that exchange has one process group per direction, so that no message waits for the other
    direction or another pair. Channels that were not opened ahead use the process group of the pipeline axis.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.place = ranks.mesh.pipeline_rank(ranks.rank)
        self._leaving: dict[int, deque[tuple[Callable[[], None], Tensor]]] = defaultdict(deque)  # by destination
        self._coming: dict[int, tuple[Callable[[], None], Tensor, tuple[int, ...]]] = {}
        self._exchanged = self._is_broken = False  # since the program began; for good

    def begin(self) -> None:
        """A program begins, or resumes after its turn, on all ranks, which have received everything sent before.

        Raises StateError if an earlier step failed between messages: what is still under way would be taken for new
        messages.
        """
        if self._is_broken:
            raise StateError(
                "a step of the pipeline failed while its ranks exchanged values, and some of these transfers may "
                "still be in flight: start all ranks again from the last checkpoint"
            )
        self._exchanged = False

    def send(self, value: Tensor, to: int) -> None:
        """Starts to send; `value` may be freed, since this object keeps what is under way."""
        self._exchanged = True
        moving = value.contiguous()
        group, number = self._group(self.place, to)
        work = self.ranks.call(dist.isend, moving, group=group, group_dst=number(to))
        self._leaving[to].append((waiting(work, dist.isend), moving))

    def finish_send(self, value: Tensor, to: int) -> None:
        """Waits for the oldest message under way to a rank, which is `value`. Blocks the host if the device is the CPU,
        otherwise only work launched afterwards."""
        wait, _ = self._leaving[to][0]
        self.ranks.call(wait)
        self._leaving[to].popleft()  # only now: where the wait fails, the message may still be under way

    def start_receive(self, shape: list[int], stride: list[int], dtype: torch.dtype, source: int,
                      device: torch.device) -> Tensor:  # fmt: skip
        """Starts to receive a tensor, which must not be read before `finish_receive`."""
        self._exchanged = True
        coming = torch.empty(shape, dtype=dtype, device=device)
        group, number = self._group(source, self.place)
        work = self.ranks.call(dist.irecv, coming, group=group, group_src=number(source))
        self._coming[id(coming)] = waiting(work, dist.irecv), coming, tuple(stride)
        return coming

    def finish_receive(self, coming: Tensor) -> Tensor:
        """Waits for a message, blocking as `finish_send` does; returns it in the strides that `start_receive` was
        given."""
        wait, come, stride = self._coming[id(coming)]
        self.ranks.call(wait)
        del self._coming[id(coming)]
        if come.stride() == stride:
            return come
        return torch.empty_strided(come.shape, stride, dtype=come.dtype, device=come.device).copy_(come)

    def abandon(self) -> None:
        """Gives up the messages of a failed step, whose other ends may be lost. Their memory is kept until the process
        ends, since they may still write to it."""
        self._is_broken |= self._exchanged

    def _group(self, source: int, to: int) -> tuple[Any, Callable[[int], int]]:
        """The process group of a channel, and a function from a pipeline rank to its rank in that group."""
        channel = self.ranks.channels.get((source, to))
        if channel is None:
            return self.ranks.groups[names_of(self.ranks.mesh.pipeline_axes)], lambda place: place
        return channel, sorted((source, to)).index


def open_channels(ranks: Ranks, asked: Iterable[Channel]) -> None:
    """Creates the missing process groups of channels. All ranks call it, and each creates the channels that any of them
    asks for, in the same order."""
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
                if column == _column(ranks, ranks.rank):  # ranks that are not an end of it record that it exists
                    ranks.channels[channel] = group


def _column(ranks: Ranks, rank: int) -> tuple[int, ...]:
    """A process's coordinates on the axes other than the pipeline's: the processes of one column form a pipeline."""
    axes = (axis for axis in ranks.mesh.axes if axis.kind != "pipeline")
    return tuple(ranks.mesh.coordinate(rank, axis.name) for axis in axes)


def check_messages(ranks: Ranks, sent: Mapping[int, str], received: Mapping[int, str]) -> None:
    """Raises StateError on all ranks of a pipeline if one of them waits for other messages than another one sends it.
    `sent` and `received` describe this rank's messages in order, by the pipeline rank at the other end."""
    if not ranks.mesh.pipeline_axes:
        return
    column, told = _column(ranks, ranks.rank), ranks.told_by_sharing((dict(sent), dict(received)))
    mine = {ranks.mesh.pipeline_rank(rank): each for rank, each in told.items() if _column(ranks, rank) == column}
    for source, (leaving, _) in mine.items():
        for to, (_, coming) in mine.items():
            if leaving.get(to, "") != coming.get(source, ""):
                raise StateError(
                    f"rank {source} of the pipeline sends rank {to} different messages from those that rank {to} "
                    "expects; all ranks must build the same model with the same options, and recompute the same "
                    "blocks where stages meet"
                )
