"""Split pairs: a float32 master kept exactly in the bfloat16 weight that computes and a signed 16-bit remainder.

With `bits` the 32 bits of the master, hi = (bits + 0x8000) >> 16 and lo = bits - (hi << 16). Ties round up on
the bits: rounding them to even would leave a remainder of +32768, which does not fit. Finite masters, infinities and
both zeros come back exactly; every NaN comes back as the one with bits 0x7fc00000.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 18
"""Elements handled at a time on the host, so that temporaries stay in its caches."""

_NAN = 0x7FC00000


@dataclass(frozen=True)
class SplitPair:
    """The two halves of one float32 tensor: `hi` is bfloat16, `lo` int16, both of its shape."""

    hi: Tensor
    lo: Tensor

    def __post_init__(self) -> None:
        if self.hi.dtype != torch.bfloat16 or self.lo.dtype != torch.int16 or self.hi.shape != self.lo.shape:
            raise ValueError(
                f"a split pair is bfloat16 and int16 of one shape, not {self.hi.dtype} {tuple(self.hi.shape)} "
                f"and {self.lo.dtype} {tuple(self.lo.shape)}"
            )


def pieces(flat: Tensor, on_device: int = 16 * PIECE) -> Iterator[slice]:
    """Cut a vector into slices of at most `PIECE` elements on the host and `on_device` elements elsewhere.

    On a device a launch costs more than the temporaries of larger pieces.
    """
    size = PIECE if flat.device.type == "cpu" else on_device
    for start in range(0, flat.numel(), size):
        yield slice(start, min(start + size, flat.numel()))


def split(master: Tensor, out: SplitPair | None = None) -> SplitPair:
    """Return the two halves of a float32 `master`, written into `out` where given.

    Raises:
        ValueError: `master` is not float32, or `out` is not contiguous or of another shape.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"only float32 splits into two halves of 16 bits, not {master.dtype}")
    if out is None:
        halves = (torch.empty(master.shape, dtype=half, device=master.device) for half in (torch.bfloat16, torch.int16))
        out = SplitPair(*halves)
    source, hi, lo = master.detach().reshape(-1), *_flat(out, master.shape)
    for piece in pieces(source):
        part = source[piece]
        bits = part.view(torch.int32).masked_fill(part.isnan(), _NAN)
        hi[piece] = (bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
        lo[piece] = (bits << 16 >> 16).to(torch.int16)
    return out


def join(pair: SplitPair, out: Tensor | None = None) -> Tensor:
    """Return the float32 master of a pair, written into `out` where given.

    Raises:
        ValueError: a tensor is not contiguous, or `out` is not float32 of the pair's shape.
    """
    if out is None:
        out = torch.empty(pair.hi.shape, dtype=torch.float32, device=pair.hi.device)
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"a master is contiguous float32, not {out.dtype} with strides {out.stride()}")
    target, hi, lo = out.view(-1), *_flat(pair, out.shape)
    for piece in pieces(target):
        bits = hi[piece].view(torch.int16).to(torch.int32) << 16
        target[piece] = (bits + lo[piece]).view(torch.float32)
    return out


def _flat(pair: SplitPair, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return both halves as vectors that share memory with the pair."""
    if pair.hi.shape != shape or not pair.hi.is_contiguous() or not pair.lo.is_contiguous():
        raise ValueError(f"expected a contiguous split pair of shape {tuple(shape)}, found {tuple(pair.hi.shape)}")
    return pair.hi.detach().view(-1), pair.lo.view(-1)
