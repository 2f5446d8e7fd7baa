"""Split pairs: a float32 master kept exactly as the bfloat16 weight that computes and a signed 16-bit remainder or,
without a remainder, rounded stochastically to that weight.

With `bits` the 32 bits of the master, hi = (bits + 0x8000) >> 16 and lo = bits - (hi << 16). Ties round up on the bits:
rounding them to even would leave a remainder of +32768, which does not fit. Finite masters, infinities and both zeros
are restored exactly; every NaN becomes the one with bits 0x7fc00000.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import Draws, rounded

PIECE = 1 << 18
"""Elements handled at a time on the host, so that temporaries stay in its caches."""

_NAN = 0x7FC00000


@dataclass(frozen=True)
class SplitPair:
    """The two halves of one float32 tensor: `hi` is bfloat16, `lo` int16, both of its shape. Without `lo`, the master
    is rounded to `hi` at every write, with the randomness of `draws`."""

    hi: Tensor
    lo: Tensor | None
    draws: Draws | None = None

    def __post_init__(self) -> None:
        dtypes, shapes = zip(*((half.dtype, tuple(half.shape)) for half in self.tensors), strict=True)
        if dtypes != (torch.bfloat16, torch.int16)[: len(dtypes)] or len(set(shapes)) > 1:
            told = " and ".join(f"{dtype} {shape}" for dtype, shape in zip(dtypes, shapes, strict=True))
            raise ValueError(f"a split pair must be bfloat16 and int16 of the same shape, not {told}")
        if (self.lo is None) != (self.draws is not None):
            raise ValueError("masters either keep a remainder or are rounded stochastically; expected one of the two")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.hi,) if self.lo is None else (self.hi, self.lo)

    def flat(self) -> "SplitPair":
        """The same memory as vectors."""
        return SplitPair(self.hi.detach().view(-1), None if self.lo is None else self.lo.view(-1), self.draws)

    def cut(self, piece: slice) -> "SplitPair":
        """A part of the elements of a pair of vectors."""
        draws = None if self.draws is None else self.draws.behind(piece.start)
        return SplitPair(self.hi[piece], None if self.lo is None else self.lo[piece], draws)


def pieces(flat: Tensor, on_device: int = 16 * PIECE) -> Iterator[slice]:
    """Cuts a vector into slices of at most `PIECE` elements on the host and `on_device` elements elsewhere.

    On a device a launch costs more than the temporaries of larger pieces.
    """
    size = PIECE if flat.device.type == "cpu" else on_device
    for start in range(0, flat.numel(), size):
        yield slice(start, min(start + size, flat.numel()))


def split(master: Tensor, out: SplitPair | None = None) -> SplitPair:
    """Returns the two halves of a float32 `master`, written into `out` if given.

    Raises:
        ValueError: `master` is not float32, or `out` is not contiguous or has another shape.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"only float32 can be split into two halves of 16 bits, not {master.dtype}")
    if out is None:
        halves = (torch.empty(master.shape, dtype=half, device=master.device) for half in (torch.bfloat16, torch.int16))
        out = SplitPair(*halves)
    source, flat = master.detach().reshape(-1), _flat(out, master.shape)
    for piece in pieces(source):
        _split(source[piece], flat.cut(piece))
    return out


def _split(master: Tensor, out: SplitPair) -> None:
    if out.lo is None:
        assert out.draws is not None
        out.hi.copy_(rounded(master, out.draws))
        return
    bits = master.view(torch.int32).masked_fill(master.isnan(), _NAN)
    out.hi.copy_((bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16))
    out.lo.copy_((bits << 16 >> 16).to(torch.int16))


def join(pair: SplitPair, out: Tensor | None = None) -> Tensor:
    """Returns the float32 master of a pair, written into `out` if given.

    Raises:
        ValueError: a tensor is not contiguous, or `out` is not float32 of the pair's shape.
    """
    if out is None:
        out = torch.empty(pair.hi.shape, dtype=torch.float32, device=pair.hi.device)
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"a master must be contiguous float32, not {out.dtype} with strides {out.stride()}")
    target, flat = out.view(-1), _flat(pair, out.shape)
    for piece in pieces(target):
        part = flat.cut(piece)
        bits = part.hi.view(torch.int16).to(torch.int32) << 16
        target[piece] = (bits if part.lo is None else bits + part.lo).view(torch.float32)
    return out


def _flat(pair: SplitPair, shape: torch.Size) -> SplitPair:
    if pair.hi.shape != shape or not all(half.is_contiguous() for half in pair.tensors):
        raise ValueError(f"expected a contiguous split pair of shape {tuple(shape)}, found {tuple(pair.hi.shape)}")
    return pair.flat()
