"""A parameter's moments as a checkpoint reads and writes them, in whichever format they are stored."""

import torch
from torch import Tensor

from ..distributed.local_shards import Region
from ..memory.stored import Stored
from .states import ChunkState, Inside


def stored_moment(state: ChunkState, number: int, slot: int, shape: tuple[int, ...],
                  regions: tuple[Region, ...]) -> Stored:  # fmt: skip
    """One of a parameter's moments. `shape` is the whole parameter's; `regions` are the parts of it that this process
    holds. Its dtype is that of storage, or the master's where values share scales."""
    moment = state.moments[number]
    if moment.dtype != torch.uint8:
        return Stored.of(moment, shape, regions)
    shared = _SharingScales(state, number, slot)
    return Stored(shape, state.layout.master_dtype, regions, shared.read, shared.write)


class _SharingScales:
    """Access to values that share scales. Writes are held back until all values are known, which fix the scales."""

    def __init__(self, state: ChunkState, number: int, slot: int) -> None:
        self.state, self.number, self.slot = state, number, slot
        self._waiting: Tensor | None = None
        self._missing = 0

    def read(self, region: Region) -> Tensor:
        return self._within(region, self.state.read_moment(self.number, self.slot).reshape(-1))

    def write(self, region: Region, inside: Inside, values: Tensor) -> None:
        if self._waiting is None:
            self._missing = self.state.layout.slots[self.slot].numel
            self._waiting = torch.zeros(self._missing, dtype=self.state.layout.master_dtype)
        self._within(region, self._waiting)[inside] = values
        self._missing -= values.numel()
        if not self._missing:
            self.state.write_moment(self.number, self.slot, self._waiting)
            self._waiting = None

    def _within(self, region: Region, flat: Tensor) -> Tensor:
        """The values of a region, whose offsets count elements of the chunk, in one parameter's flat values."""
        return flat.as_strided(region.sizes, region.strides, region.start - self.state.layout.slots[self.slot].offset)
