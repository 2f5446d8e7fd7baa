"""Stochastic rounding of float32 to bfloat16 in plain torch, with the same bits as the kernels on either side.

A value between two neighbouring bfloat16 numbers becomes one or the other, with a probability that depends on how near
it is, so that changes too small to represent are kept on average. The random bits are a hash of the optimizer's seed,
the number of the update, the parameter's name and the element's index in it: they do not depend on where states lie or
how they are cut.
"""

from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

_MASK, _NAN = 0xFFFFFFFF, 0x7FC00000


@dataclass(frozen=True)
class Draws:
    """The randomness for a range of one parameter's elements in one update: `key` has the 64 bits that all elements
    share; `first` is the index of the range's first element."""

    key: int
    first: int = 0

    @property
    def halves(self) -> tuple[int, int]:
        """The low and the high 32 bits of the key."""
        return self.key & _MASK, self.key >> 32

    def behind(self, numel: int) -> "Draws":
        """The draws of the range that starts `numel` elements later."""
        return replace(self, first=self.first + numel)


def key_of(seed: int, step: int, name: str) -> int:
    """The 64-bit key that all elements of a parameter share in update number `step`."""
    return int.from_bytes(blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest(), "little")


def chance(draws: Draws, numel: int, device: torch.device) -> Tensor:
    """16 random bits for each of `numel` elements, in int64."""
    low, high = draws.halves
    x = torch.arange(draws.first, draws.first + numel, device=device)  # in place from here: int64 is twice the values
    x.add_(low).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_MASK).bitwise_xor_(high)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16).bitwise_right_shift_(16)


def rounded(values: Tensor, draws: Draws) -> Tensor:
    """A float32 vector, rounded to bfloat16; every NaN becomes the same one."""
    up = chance(draws, values.numel(), values.device)
    up.add_(values.view(torch.int32)).bitwise_and_(_MASK)
    upper = up.masked_fill_(values.isnan(), _NAN).bitwise_right_shift_(16)
    return upper.to(torch.int16).view(torch.bfloat16)
