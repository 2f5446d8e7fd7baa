"""A tensor as a checkpoint sees it: the whole, and the regions that this process holds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.local_shards import Region


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, and access to the parts that this process holds.

    Fields:
        shape, dtype: of the whole tensor.
        regions: the rectangles of it that this process holds.
        read: returns the values of a region.
        write: sets the values of a part of a region, given as one slice per dimension.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: tuple[Region, ...]
    read: Callable[[Region], Tensor]
    write: Callable[[Region, tuple[slice, ...], Tensor], None]

    @classmethod
    def of(cls, flat: Tensor, shape: tuple[int, ...], regions: tuple[Region, ...]) -> "Stored":
        """A tensor whose regions lie in `flat`."""

        def write(region: Region, inside: tuple[slice, ...], values: Tensor) -> None:
            region.of(flat)[inside].copy_(values)

        return cls(shape, flat.dtype, regions, lambda region: region.of(flat), write)
