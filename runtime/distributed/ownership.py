"""Who along a pipeline has which parameters: what owners have is told to all, and what several have counts once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..isa.layout import Owners
from ..isa.mesh import names_of
from .local_shards import PIECE
from .ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Ownership:
    """Which parameters this process, one of `ranks`, has: those that it is among the `owners` of, or all, where there
    are none."""

    ranks: Ranks
    owners: Mapping[str, Owners] = field(default_factory=dict)

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The parameters that this process lacks."""
        return tuple(name for name, owners in self.owners.items() if self._place not in owners)

    def counts(self, name: str) -> bool:
        """Whether this process is the one of a parameter's owners whose copy counts in sums over all parameters."""
        return not self.owners or self.owners[name][0] == self._place

    def ranks_of(self, name: str) -> str:
        """Who has a parameter, for messages."""
        mesh, owners = self.ranks.mesh, self.owners[name]
        return ", ".join(str(rank) for rank in range(mesh.size) if mesh.pipeline_rank(rank) in owners)

    def share(self, name: str, value: Tensor, device: torch.device) -> Tensor:
        """The first owner's `value` of what belongs to a parameter; elsewhere that tells shape and dtype alone, and
        what comes is on the CPU. All processes call it, for one after the other; they exchange by way of `device`."""
        if not (self.owners and self.ranks.together):
            return value
        self.ranks.meet("putting parameters together, as state_dict() does")
        source, group = self.owners[name][0], self.ranks.groups[names_of(self.ranks.mesh.pipeline_axes)]
        is_source = source == self._place
        whole = value.detach().contiguous() if is_source else torch.empty(value.shape, dtype=value.dtype)
        for piece in whole.view(-1).split(PIECE):
            moving = piece.to(device) if is_source else torch.empty_like(piece, device=device)
            self.ranks.call(dist.broadcast, moving, group=group, group_src=source)
            if not is_source:
                piece.copy_(moving)
        return whole

    def gather(self, values: Mapping[str, T]) -> dict[str, T]:
        """What the owners of parameters have for them, in the order of all parameters: objects that are small. All
        processes call it."""
        if not (self.owners and self.ranks.together):
            return dict(values)
        everyones = reversed(self.ranks.gather(dict(values)))
        found = {name: value for each in everyones for name, value in each.items()}
        return {name: found[name] for name in self.owners if name in found}

    def raise_alike(self, error: Exception | None) -> None:
        """Raise where any of the processes that have other parameters has an error."""
        if self.owners:
            self.ranks.raise_alike(error)
        elif error is not None:
            raise error

    def norm(self, norm: Tensor) -> Tensor:
        """The norm of all parameters' gradients, of that of the ones which count on each process."""
        if not (self.owners and self.ranks.together):
            return norm
        self.ranks.meet("the norm of gradients")
        squares = norm.double().square()  # not every process need have parameters of every dtype
        self.ranks.call(dist.all_reduce, squares, group=self.ranks.groups[names_of(self.ranks.mesh.pipeline_axes)])
        return squares.sqrt().to(norm.dtype)

    def among(self, names: Iterable[str]) -> list[str]:
        """Those of some parameters that this process has."""
        elsewhere = set(self.elsewhere)
        return [name for name in names if name not in elsewhere]

    @property
    def _place(self) -> int:
        return self.ranks.mesh.pipeline_rank(self.ranks.rank)
