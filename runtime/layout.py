"""Where every parameter lives: plain layout dataclasses shared by plans, passes and the machine."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

ALIGNMENT_BYTES = 256
"""Every slot starts on this boundary, so that vector loads and tensor cores see aligned weights."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a chunk: `offset` and `numel` count elements of the chunk's dtype."""

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ChunkLayout:
    """A contiguous 1-D buffer of parameters that share dtypes and trainability, in order of first use.

    `dtype` is what the program computes with, `master_dtype` what the optimizer updates.
    """

    index: int
    numel: int
    dtype: torch.dtype
    master_dtype: torch.dtype
    trainable: bool
    slots: tuple[Slot, ...]

    @property
    def compute_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def master_bytes(self) -> int:
        return self.numel * self.master_dtype.itemsize

    @property
    def casts(self) -> bool:
        """Whether computing needs a copy in another dtype than the master's."""
        return self.dtype != self.master_dtype


@dataclass(frozen=True)
class Layout:
    """All chunks of a model. `tied` maps each further name of a shared parameter to its first name."""

    chunks: tuple[ChunkLayout, ...]
    tied: tuple[tuple[str, str], ...] = ()

    @cached_property
    def places(self) -> dict[str, tuple[ChunkLayout, int]]:
        """Parameter name -> (its chunk, its slot's number)."""
        return {slot.name: (chunk, i) for chunk in self.chunks for i, slot in enumerate(chunk.slots)}
