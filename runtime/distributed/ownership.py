"""Which pipeline ranks have which parameters: shares values with the ranks that lack them, and counts each value
once."""

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
    """Tells which parameters this process, one of `ranks`, has: those whose `owners` include its pipeline rank, or all
    if `owners` is empty."""

    ranks: Ranks
    owners: Mapping[str, Owners] = field(default_factory=dict)

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The parameters that this process lacks."""
        return tuple(name for name, owners in self.owners.items() if self._place not in owners)

    def counts(self, name: str) -> bool:
        """Whether this process's copy of a parameter counts in sums over all parameters: only the first owner's
        does."""
        return not self.owners or self.owners[name][0] == self._place

    def ranks_of(self, name: str) -> str:
        """The ranks that have a parameter, for messages."""
        mesh, owners = self.ranks.mesh, self.owners[name]
        return ", ".join(str(rank) for rank in range(mesh.size) if mesh.pipeline_rank(rank) in owners)

    def share(self, name: str, value: Tensor, device: torch.device) -> Tensor:
        """Broadcasts the first owner's `value` of a tensor that belongs to a parameter. On other ranks `value` gives
        only shape and dtype, and the result is on the CPU. All processes call it, for one value after the other; they
        exchange through `device`."""
        if not (self.owners and self.ranks.together):
            return value
        self.ranks.meet("gathering parameters, as state_dict() does")
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
        """Every parameter's value from the first rank that has one, in the model's order; values are small picklable
        objects. All processes call it."""
        if not (self.owners and self.ranks.together):
            return dict(values)
        everyones = reversed(self.ranks.gather(dict(values)))
        found = {name: value for each in everyones for name, value in each.items()}
        return {name: found[name] for name in self.owners if name in found}

    def raise_alike(self, error: Exception | None) -> None:
        """If any pipeline rank has an error, raises on all, as `Ranks.raise_alike` does."""
        if self.owners:
            self.ranks.raise_alike(error)
        elif error is not None:
            raise error

    def norm(self, norm: Tensor) -> Tensor:
        """The norm over all parameters' gradients, from the `norm` of those that count on each process."""
        if not (self.owners and self.ranks.together):
            return norm
        self.ranks.meet("the norm of gradients")
        squares = norm.double().square()  # processes need not have parameters of the same dtypes
        self.ranks.call(dist.all_reduce, squares, group=self.ranks.groups[names_of(self.ranks.mesh.pipeline_axes)])
        return squares.sqrt().to(norm.dtype)

    def among(self, names: Iterable[str]) -> list[str]:
        """The names among `names` whose parameters this process has."""
        elsewhere = set(self.elsewhere)
        return [name for name in names if name not in elsewhere]

    @property
    def _place(self) -> int:
        return self.ranks.mesh.pipeline_rank(self.ranks.rank)
