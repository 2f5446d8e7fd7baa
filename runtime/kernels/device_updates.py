"""Optimizer updates on the device over split pairs, in place, one kernel launch each.

The kernels are written in Triton, which comes with torch's GPU builds; plain torch stands in if it is missing or cannot
compile. Both match the host kernel bit for bit: operations are in the order of `host_updates.cpp`, fused multiply-adds
are where it has them, divisions and roots are correctly rounded, and compilers may fuse nothing else.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..isa.moments import BLOCK
from . import reference_updates, triton_updates
from .rounding import Draws
from .split_pairs import SplitPair
from .update_rules import (
    AdamHyper,
    AdamMoments,
    Gradient,
    LionHyper,
    SgdHyper,
    check_momentum,
    check_update,
    choose_variant,
)

TRITON, TORCH = "triton", "torch"

_TILE, _WARPS = 1024, 8
"""4 elements per thread: 16 bytes of each float32 stream, the widest access there is, without a change of layout."""
_STORED = {torch.float32: triton_updates.EXACT, torch.bfloat16: triton_updates.HALF, torch.uint8: triton_updates.CODES}
_SCALE_ALIGNMENT_BYTES = 4
_MOST = 2**31 - 1
"""The most elements that 32-bit offsets can address."""


def available_variants() -> tuple[str, ...]:
    """Returns the variants that run on this machine, the fastest first.

    Tries once to compile a kernel. If there is a GPU and that fails, warns once, and only torch is left.
    """
    return (TRITON, TORCH) if _compiles() else (TORCH,)


class DeviceKernel:
    """One variant of the updates, enqueued on the current stream of the device that holds the tensors.

    Calls do not wait for the device. Triton's variant allocates nothing there; torch's has temporaries of some 70 bytes
    for each of at most 2**20 elements.

    Args:
        variant: one of `available_variants()`; by default the fastest.

    Raises:
        ValueError: this machine cannot run that variant.
    """

    def __init__(self, variant: str | None = None) -> None:
        self.variant = choose_variant(variant, available_variants())

    @property
    def widens(self) -> bool:
        """Whether moments may be stored in other formats than float32."""
        return self.variant == TRITON

    def adam(self, pair: SplitPair, gradient: Gradient, moments: AdamMoments, hyper: AdamHyper) -> None:
        """Updates `pair` and `moments` in place by AdamW or Adam.

        Tensors are contiguous vectors of equal size, below 2**31, on one device, at any alignment, and do not overlap.
        Memory accesses are widest if they start at multiples of 16 bytes. If the variant `widens`, moments may be
        stored in any format, the same for both; 8-bit moments start at multiples of 4 bytes.

        Raises:
            ValueError: a tensor has another size, dtype, device or layout.
        """
        _check(pair, gradient, (moments.mean, moments.square), self.widens)
        if self._launches(pair):
            _launch_adam(pair, gradient, moments, hyper)
        else:
            reference_updates.adam(pair.flat(), _detached_gradient(gradient), moments, hyper)

    def sgd(self, pair: SplitPair, gradient: Gradient, buffer: Tensor | None, hyper: SgdHyper) -> None:
        """Updates `pair` and the momentum `buffer` in place by SGD.

        `buffer` is None if and only if `hyper.momentum` is 0. Tensors are as for `adam`.

        Raises:
            ValueError: as for `adam`, or momentum without a buffer, or a buffer without momentum.
        """
        check_momentum(buffer, hyper)
        _check(pair, gradient, () if buffer is None else (buffer,), self.widens)
        if self._launches(pair):
            _launch_sgd(pair, gradient, buffer, hyper)
        else:
            reference_updates.sgd(pair.flat(), _detached_gradient(gradient), buffer, hyper)

    def lion(self, pair: SplitPair, gradient: Gradient, mean: Tensor, hyper: LionHyper) -> None:
        """Updates `pair` and `mean` in place by Lion. Tensors are as for `adam`.

        Raises:
            ValueError: as for `adam`.
        """
        _check(pair, gradient, (mean,), self.widens)
        if self._launches(pair):
            _launch_lion(pair, gradient, mean, hyper)
        else:
            reference_updates.lion(pair.flat(), _detached_gradient(gradient), mean, hyper)

    def _launches(self, pair: SplitPair) -> bool:
        """Whether to launch the Triton kernel: it needs a GPU, and an empty grid cannot be launched."""
        return self.variant == TRITON and pair.hi.is_cuda and pair.hi.numel() > 0


def _check(pair: SplitPair, gradient: Gradient, state: tuple[Tensor, ...], widens: bool) -> None:
    """Raises ValueError for what the kernel would read out of bounds or misinterpret."""
    device = pair.hi.device
    check_update(pair, gradient, state, device, widens=widens)
    for tensor in (pair.hi, gradient.values, *state):
        if tensor.dim() != 1 or tensor.numel() > _MOST:
            raise ValueError(f"an update takes vectors of at most {_MOST} elements, not {tuple(tensor.shape)}")
    for moment in state:
        if moment.dtype == torch.uint8 and moment.storage_offset() % _SCALE_ALIGNMENT_BYTES:
            raise ValueError(
                f"8-bit moments must begin at a multiple of {_SCALE_ALIGNMENT_BYTES} bytes, as their scales do"
            )
    if isinstance(gradient.scale, Tensor) and gradient.scale.device != device:
        raise ValueError(f"an update on {device} needs the gradient's scale there, not on {gradient.scale.device}")


def _detached_gradient(gradient: Gradient) -> Gradient:
    return Gradient(gradient.values.detach(), gradient.scale)


# -- launches ------------------------------------------------------------------------------------------------


def _launch_adam(pair: SplitPair, gradient: Gradient, moments: AdamMoments, hyper: AdamHyper) -> None:
    k = hyper.scalars()
    tensors = (*_weights(pair), gradient.values, _bits(moments.mean), _bits(moments.square))
    factors = (k.l2, k.decay, k.step, k.lerp, k.keep, k.add, k.root, k.eps)
    options = _options(k.l2, gradient, moments.mean.dtype)
    with torch.cuda.device(pair.hi.device):
        triton_updates.adam[_grid(pair)](*tensors, _scale(gradient), *map(float, factors), pair.hi.numel(), **options)


def _launch_sgd(pair: SplitPair, gradient: Gradient, buffer: Tensor | None, hyper: SgdHyper) -> None:
    k = hyper.scalars()
    tensors = (*_weights(pair), gradient.values, None if buffer is None else _bits(buffer))
    factors = (k.l2, k.step, k.keep, k.add)
    options = _options(k.l2, gradient, torch.float32 if buffer is None else buffer.dtype)
    flags = {"fresh": bool(hyper.first), "nesterov": bool(hyper.nesterov)} | options
    with torch.cuda.device(pair.hi.device):
        triton_updates.sgd[_grid(pair)](*tensors, _scale(gradient), *map(float, factors), pair.hi.numel(), **flags)


def _launch_lion(pair: SplitPair, gradient: Gradient, mean: Tensor, hyper: LionHyper) -> None:
    k = hyper.scalars()
    tensors = (*_weights(pair), gradient.values, _bits(mean))
    factors = (k.decay, k.step, k.keep, k.add, k.mix_keep, k.mix_add)
    options = _options(k.l2, gradient, mean.dtype)
    del options["coupled"]  # Lion's weight decay never enters the gradient
    with torch.cuda.device(pair.hi.device):
        triton_updates.lion[_grid(pair)](*tensors, _scale(gradient), *map(float, factors), pair.hi.numel(), **options)


def _weights(pair: SplitPair) -> tuple[Tensor, Tensor | None, int, int, int]:
    """Returns both halves as integers of their bits, and, for pairs without the lower one, what rounding draws from."""
    draws = Draws(0) if pair.draws is None else pair.draws
    return _bits(pair.hi.detach()), pair.lo, *map(_signed, (*draws.halves, draws.first))


def _signed(number: int) -> int:
    """Returns the int32 with the same low 32 bits: kernels add and multiply it alike."""
    return (number + 2**31) % 2**32 - 2**31


def _bits(tensor: Tensor) -> Tensor:
    """Returns bfloat16 as the integers of its bits, and other tensors as they are."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _scale(gradient: Gradient) -> float | Tensor:
    """Returns what the kernel takes: a number, which Triton rounds to float32, or the tensor to read it from."""
    return gradient.scale.float() if isinstance(gradient.scale, Tensor) else float(gradient.scale)


def _grid(pair: SplitPair) -> tuple[int]:
    return (-(-pair.hi.numel() // _TILE),)


def _options(l2: float, gradient: Gradient, moment: torch.dtype) -> dict[str, Any]:
    """Returns what a kernel is compiled for: the variant of the update, the tile, and no fusion but explicit fma."""
    columns = BLOCK if moment == torch.uint8 else _TILE
    variant = {"stored": _STORED[moment], "coupled": l2 != 0, "scale_is_read": isinstance(gradient.scale, Tensor)}
    tile = {"rows": _TILE // columns, "columns": columns}
    return variant | tile | {"num_warps": _WARPS, "enable_fp_fusion": False}


@cache
def _compiles() -> bool:
    """Whether kernels compile, tried on one of them; warns if there is a GPU but they do not.

    Triton builds its interface to the driver with the machine's C compiler, which may be missing.
    """
    if not torch.cuda.is_available():
        return False
    try:
        if triton_updates.triton is None:
            raise ModuleNotFoundError("triton is not installed")
        tensors = (torch.int16, torch.int16, 0, 0, 0, torch.bfloat16, None)
        options = _options(0.0, Gradient(torch.empty(0)), torch.float32) | {"fresh": False, "nesterov": False}
        triton_updates.sgd.warmup(*tensors, 1.0, *[0.0] * 4, 0, **options, grid=(1,))
    except Exception as error:  # whatever it is, plain torch can run the updates
        warnings.warn(
            f"updates on the device run in plain torch, which is exact but many times slower: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True
