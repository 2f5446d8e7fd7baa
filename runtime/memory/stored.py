"""A tensor as a checkpoint sees it: whole, and what of it this process has."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.local_shards import Region


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, as far as this process has it.

    Fields:
        shape, dtype: of the whole.
        regions: what this process has of it.
        read: the values of a region.
        write: sets those of a part of a region, which is given as slices.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: tuple[Region, ...]
    read: Callable[[Region], Tensor]
    write: Callable[[Region, tuple[slice, ...], Tensor], None]

    @classmethod
    def of(cls, flat: Tensor, shape: tuple[int, ...], regions: tuple[Region, ...]) -> "Stored":
        """What lies in `flat`, by regions."""

        def write(region: Region, inside: tuple[slice, ...], values: Tensor) -> None:
            region.of(flat)[inside].copy_(values)

        return cls(shape, flat.dtype, regions, lambda region: region.of(flat), write)
