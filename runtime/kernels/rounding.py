"""Stochastic rounding of float32 to bfloat16 in plain torch: the same bits as the kernels' on either side.

A value lies between two neighbours in bfloat16, and becomes the one or the other with a chance that goes with how near
it is: what is too small to be kept is kept in the mean. Chance is a hash of the optimizer's seed, the number of the
update, the parameter's name and the element's number in it, so that it does not depend on where states lie, or how
they are cut.
"""

from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

_MASK, _NAN = 0xFFFFFFFF, 0x7FC00000


@dataclass(frozen=True)
class Draws:
    """Chance for a range of a parameter's elements in one update: `key` is all of 64 bits that its elements share, and
    `first` the number of the first one."""

    key: int
    first: int = 0

    @property
    def halves(self) -> tuple[int, int]:
        """The key as two numbers of 32 bits."""
        return self.key & _MASK, self.key >> 32

    def behind(self, numel: int) -> "Draws":
        """Of the elements that come so many later."""
        return replace(self, first=self.first + numel)


def key_of(seed: int, step: int, name: str) -> int:
    """What all of a parameter's elements draw with in the update of that number."""
    return int.from_bytes(blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest(), "little")


def chance(draws: Draws, numel: int, device: torch.device) -> Tensor:
    """16 random bits for each element, in int64."""
    low, high = draws.halves
    x = torch.arange(draws.first, draws.first + numel, device=device) + low & _MASK
    x = (x ^ x >> 16) * 0x7FEB352D & _MASK ^ high
    x = (x ^ x >> 15) * 0x846CA68B & _MASK
    return (x ^ x >> 16) >> 16


def rounded(values: Tensor, draws: Draws) -> Tensor:
    """A float32 vector as bfloat16; every NaN becomes the same one."""
    bits = values.view(torch.int32).to(torch.int64) & _MASK
    up = bits + chance(draws, values.numel(), values.device)
    upper = torch.where(values.isnan(), _NAN, up) >> 16
    return upper.to(torch.int16).view(torch.bfloat16)
