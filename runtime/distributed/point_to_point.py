"""Messages between the ranks of a pipeline: what one sends another receives, in the order in which it was sent."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..isa.mesh import Mesh, names_of

Channel = tuple[int, int]
"""From one rank of the pipeline to another one."""


class Messages:
    """The instructions `send` and `receive`, and what is on its way.

    `channels` has a process group for each pair of ranks that exchange, one way, so that neither direction waits for
    the other, nor one pair for another; those of other pairs go through the group of the pipeline's axis. `call` runs
    one of torch.distributed's functions and turns its failure into an error of ours.
    """

    def __init__(self, mesh: Mesh, rank: int, groups: Mapping[tuple[str, ...], Any], channels: Mapping[Channel, Any],
                 call: Callable[..., Any]) -> None:  # fmt: skip
        self.place = mesh.pipeline_rank(rank)
        self._axis = names_of(mesh.pipeline_axes)
        self._groups, self._channels, self._call = groups, channels, call
        self._under_way: list[tuple[Any, Tensor]] = []

    def send(self, value: Tensor, to: int) -> None:
        """The value may be let go of: what is on its way is kept here."""
        self._under_way = [(work, kept) for work, kept in self._under_way if not work.is_completed()]
        moving = value.contiguous()
        group, number = self._group(self.place, to)
        self._under_way.append((self._call(dist.isend, moving, group=group, group_dst=number(to)), moving))

    def receive(self, shape: list[int], stride: list[int], dtype: torch.dtype, source: int,
                device: torch.device) -> Tensor:  # fmt: skip
        """Blocks the host where the device is one, and else what is launched behind it."""
        come = torch.empty(shape, dtype=dtype, device=device)
        group, number = self._group(source, self.place)
        self._call(dist.recv, come, group=group, group_src=number(source))
        if come.stride() == tuple(stride):
            return come
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(come)

    def abandon(self) -> None:
        """Forget what is under way, of a step that failed: who would receive it may be lost."""
        self._under_way.clear()

    def _group(self, source: int, to: int) -> tuple[Any, Callable[[int], int]]:
        """The process group of a channel, and which of its members a rank of the pipeline is."""
        channel = self._channels.get((source, to))
        if channel is None:
            return self._groups[self._axis], lambda place: place
        return channel, sorted((source, to)).index
