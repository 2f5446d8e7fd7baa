"""The update kernels' arithmetic in plain torch, on the host or a device: the same bits where no kernel can be built.

The order of operations is that of `torch.optim`'s single-tensor code. On CPUs with fused multiply-add torch rounds once
in `lerp`, `addcmul` and `add` with a factor, and so does the kernel. Whether this build of torch does so on this CPU is
tested once; if not, and on any device, each is computed exactly through float64, several times slower.

Other operations of torch are replaced everywhere. The square root is taken in float64: in float32 torch uses a vector
library's, which may be off by one unit in the last place. `lerp` is an `add`: with weight 1 torch's vectorized loop and
its tail disagree on signs of 0. `addcdiv` is spelled out, and divisors are tensors on their device: CUDA groups the
former differently, and multiplies by the inverse of a number.
"""

from functools import cache

import torch
from torch import Tensor

from .split_pairs import PIECE, SplitPair, join, pieces, split
from .update_rules import AdamHyper, AdamMoments, Gradient, LionHyper, Scalars, SgdHyper

_ON_DEVICE = 4 * PIECE
"""Elements handled at a time on a device: some 70 bytes of temporaries each, against launches that cost a few us."""


def adam(pair: SplitPair, gradient: Gradient, moments: AdamMoments, hyper: AdamHyper) -> None:
    """Updates flat tensors in place by AdamW or Adam; temporaries are a few pieces large."""
    k = hyper.scalars()
    root = torch.full((), k.root, dtype=torch.float32, device=pair.hi.device)
    for piece in pieces(pair.hi, _ON_DEVICE):
        part = pair.cut(piece)
        mean, square = moments.mean[piece], moments.square[piece]
        weight = join(part)
        grad = _gradient(gradient, piece, weight, k)
        _lerp(mean, grad, k.lerp)
        _add_square(square.mul_(k.keep), grad, k.add)
        size = square.double().sqrt_().float().div_(root).add_(k.eps)
        split(weight.mul_(k.decay).add_((mean * k.step).div_(size)), part)


def sgd(pair: SplitPair, gradient: Gradient, buffer: Tensor | None, hyper: SgdHyper) -> None:
    """Updates flat tensors in place by SGD; `buffer` is the momentum, None without."""
    k = hyper.scalars()
    for piece in pieces(pair.hi, _ON_DEVICE):
        part = pair.cut(piece)
        weight = join(part)
        grad = _gradient(gradient, piece, weight, k)
        if buffer is not None:
            momentum = buffer[piece]
            if hyper.first:
                momentum.copy_(grad)
            else:
                momentum.copy_(_add_scaled(momentum.mul_(k.keep), grad, k.add))
            grad = _add_scaled(grad, momentum, k.keep) if hyper.nesterov else momentum
        split(_add_scaled(weight, grad, k.step), part)


def lion(pair: SplitPair, gradient: Gradient, mean: Tensor, hyper: LionHyper) -> None:
    """Updates flat tensors in place by Lion."""
    k = hyper.scalars()
    for piece in pieces(pair.hi, _ON_DEVICE):
        part, moment = pair.cut(piece), mean[piece]
        weight = join(part)
        grad = _gradient(gradient, piece, weight, k)
        mixed = _add_scaled(moment * k.mix_keep, grad, k.mix_add)
        moment.copy_(_add_scaled(moment.mul_(k.keep), grad, k.add))
        sign = torch.where(mixed.isnan(), mixed, mixed.sign())
        split(weight.mul_(k.decay).add_(sign.mul_(k.step)), part)


def add(total: Tensor, gradient: Gradient, fresh: bool) -> None:
    """Adds a scaled gradient to the flat `total` in place; if `fresh`, overwrites it."""
    for piece in pieces(total, _ON_DEVICE):
        part, grad = total[piece], gradient.values[piece].float()
        part.copy_(grad * gradient.scale if fresh else _add_scaled(part, grad, float(gradient.scale)))


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns a * b + c for float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to odd there, so that the second rounding, to float32, sees on
    which side of a tie it lies (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    bits = total.view(torch.int64)
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    outward = torch.where((error > 0) == (total > 0), 1, -1)
    return (bits + inexact * outward).view(torch.float64).float()


@cache
def torch_fuses() -> bool:
    """Whether torch's own operators round `a + factor * b` once on this CPU, in vectorized loops and in their tails."""
    a, b = torch.randn(2, 4096 + 13, generator=torch.Generator().manual_seed(0)).unbind()
    added, squared = torch.add(a, b, alpha=0.3), torch.addcmul(a, b, b, value=0.1)
    return torch.equal(added, _add_exactly(a, b, 0.3)) and torch.equal(squared, _add_square_exactly(a, b, 0.1))


def _fuses(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and torch_fuses()


def _gradient(gradient: Gradient, piece: slice, weight: Tensor, k: Scalars) -> Tensor:
    """Returns one piece of the gradient in float32, scaled, with coupled weight decay added."""
    grad = gradient.values[piece].float() * gradient.scale
    return _add_scaled(grad, weight, k.l2) if k.l2 else grad


def _add_scaled(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Returns a + factor * b, rounded once."""
    return torch.add(a, b, alpha=factor) if _fuses(a) else _add_exactly(a, b, factor)


def _lerp(mean: Tensor, grad: Tensor, weight: float) -> None:
    """Moves `mean` towards `grad`, starting from the nearer one; product and sum are rounded once, together."""
    rounded = _single(weight)
    if rounded < 0.5:
        mean.copy_(_add_scaled(mean, grad - mean, weight))
    else:
        mean.copy_(_add_scaled(grad, grad - mean, float(rounded - 1)))


def _add_square(square: Tensor, grad: Tensor, factor: float) -> None:
    """Adds (factor * grad) * grad to `square`; the outer product and the sum are rounded once, together."""
    if _fuses(square):
        square.addcmul_(grad, grad, value=factor)
    else:
        square.copy_(_add_square_exactly(square, grad, factor))


def _add_exactly(a: Tensor, b: Tensor, factor: float) -> Tensor:
    return fused_multiply_add(_single(factor), b, a)


def _add_square_exactly(square: Tensor, grad: Tensor, factor: float) -> Tensor:
    return fused_multiply_add(_single(factor) * grad, grad, square)


def _single(value: float) -> Tensor:
    """Returns a factor rounded to float32."""
    return torch.tensor(value, dtype=torch.float32)
