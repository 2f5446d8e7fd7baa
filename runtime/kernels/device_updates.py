"""Optimizer updates on the device over split pairs, in place, by one kernel launch each.

The kernels are written in Triton, which comes with torch's builds for GPUs; plain torch stands in where it is missing
or cannot build. Both give the host kernel's bits: the order of operations is that of `host_updates.cpp`, a fused
multiply-add stands where it has one, divisions and roots are rounded correctly, and compilers may fuse nothing else.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference_updates as host_reference
from .split_pairs import SplitPair
from .update_rules import AdamHyper, AdamMoments, Gradient, SgdHyper, check_momentum, check_update, choose_variant

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for CPUs come without it
    triton = None

TRITON, TORCH = "triton", "torch"

_BLOCK, _WARPS = 1024, 8
"""4 elements a thread: 16 bytes of each float32 stream, the widest access there is, without a change of layout."""
_MOST = 2**31 - 1
"""Elements that offsets of 32 bits reach."""


def available_variants() -> tuple[str, ...]:
    """Return the variants that run on this machine, the fastest first.

    Compiles a kernel where that has not happened yet; where there is a GPU and that fails, warns once and only torch
    is left.
    """
    return (TRITON, TORCH) if _compiles() else (TORCH,)


class DeviceKernel:
    """One variant of the updates, enqueued on the current stream of the device that holds the tensors.

    Calls do not wait for the device. Triton's variant allocates nothing there; torch's has temporaries of some 70
    bytes for each of at most 2**20 elements.

    Args:
        variant: one of `available_variants()`; by default the fastest.

    Raises:
        ValueError: this machine cannot run that variant.
    """

    def __init__(self, variant: str | None = None) -> None:
        self.variant = choose_variant(variant, available_variants())

    @property
    def widens(self) -> bool:
        """Whether moments may be stored in another way than as float32."""
        return False

    def adam(self, pair: SplitPair, gradient: Gradient, moments: AdamMoments, hyper: AdamHyper) -> None:
        """Update `pair` and `moments` in place by AdamW or Adam.

        Tensors are contiguous vectors of one size, below 2**31, on one device, at any alignment, and do not overlap.
        Accesses are widest where they begin at multiples of 16 bytes.

        Raises:
            ValueError: a tensor has another size, dtype, device or layout.
        """
        _check(pair, gradient, (moments.mean, moments.square))
        if self._launches(pair):
            _launch_adam(pair, gradient, moments, hyper)
        else:
            host_reference.adam(_detached(pair), _detached_gradient(gradient), moments, hyper)

    def sgd(self, pair: SplitPair, gradient: Gradient, buffer: Tensor | None, hyper: SgdHyper) -> None:
        """Update `pair` and the momentum `buffer` in place by SGD.

        `buffer` is None exactly where `hyper.momentum` is 0. Tensors are as for `adam`.

        Raises:
            ValueError: as for `adam`, or momentum without a buffer, or a buffer without momentum.
        """
        check_momentum(buffer, hyper)
        _check(pair, gradient, () if buffer is None else (buffer,))
        if self._launches(pair):
            _launch_sgd(pair, gradient, buffer, hyper)
        else:
            host_reference.sgd(_detached(pair), _detached_gradient(gradient), buffer, hyper)

    def _launches(self, pair: SplitPair) -> bool:
        """Whether the kernel runs: Triton compiles for GPUs alone, and an empty grid cannot be launched."""
        return self.variant == TRITON and pair.hi.is_cuda and pair.hi.numel() > 0


def _check(pair: SplitPair, gradient: Gradient, state: tuple[Tensor, ...]) -> None:
    """Refuse what the kernel would read out of bounds or misunderstand."""
    device = pair.hi.device
    check_update(pair, gradient, state, device)
    for tensor in (pair.hi, gradient.values, *state):
        if tensor.dim() != 1 or tensor.numel() > _MOST:
            raise ValueError(f"an update is of vectors of at most {_MOST} elements, not of {tuple(tensor.shape)}")
    if isinstance(gradient.scale, Tensor) and gradient.scale.device != device:
        raise ValueError(f"an update on {device} needs the gradient's scale there, not on {gradient.scale.device}")


def _detached(pair: SplitPair) -> SplitPair:
    return SplitPair(pair.hi.detach(), pair.lo)


def _detached_gradient(gradient: Gradient) -> Gradient:
    return Gradient(gradient.values.detach(), gradient.scale)


# -- launches ------------------------------------------------------------------------------------------------


def _launch_adam(pair: SplitPair, gradient: Gradient, moments: AdamMoments, hyper: AdamHyper) -> None:
    k = hyper.scalars()
    tensors = (*_halves(pair), gradient.values, moments.mean, moments.square)
    factors = (k.l2, k.decay, k.step, k.lerp, k.keep, k.add, k.root, k.eps)
    with torch.cuda.device(pair.hi.device):
        _adam[_grid(pair)](
            *tensors, _scale(gradient), *map(float, factors), pair.hi.numel(), **_options(k.l2, gradient)
        )


def _launch_sgd(pair: SplitPair, gradient: Gradient, buffer: Tensor | None, hyper: SgdHyper) -> None:
    k = hyper.scalars()
    tensors = (*_halves(pair), gradient.values, buffer)
    factors = (k.l2, k.step, k.keep, k.add)
    flags = {"fresh": bool(hyper.first), "nesterov": bool(hyper.nesterov)} | _options(k.l2, gradient)
    with torch.cuda.device(pair.hi.device):
        _sgd[_grid(pair)](*tensors, _scale(gradient), *map(float, factors), pair.hi.numel(), **flags)


def _halves(pair: SplitPair) -> tuple[Tensor, Tensor]:
    """Return both halves as the integers that their bits are."""
    return pair.hi.detach().view(torch.int16), pair.lo


def _scale(gradient: Gradient) -> float | Tensor:
    """Return what the kernel takes: a number, which Triton rounds to float32, or the tensor to read it from."""
    return gradient.scale.float() if isinstance(gradient.scale, Tensor) else float(gradient.scale)


def _grid(pair: SplitPair) -> tuple[int]:
    return (-(-pair.hi.numel() // _BLOCK),)


def _options(l2: float, gradient: Gradient) -> dict[str, Any]:
    """Return what a kernel is compiled for: the variant that an update takes, and no fusion but the explicit one."""
    variant = {"coupled": l2 != 0, "scale_is_read": isinstance(gradient.scale, Tensor), "block": _BLOCK}
    return variant | {"num_warps": _WARPS, "enable_fp_fusion": False}


@cache
def _compiles() -> bool:
    """Whether kernels can be compiled, tried out on one; warns where there is a GPU but they cannot.

    Triton builds its connection to the driver with the machine's C compiler, which may be missing.
    """
    if not torch.cuda.is_available():
        return False
    try:
        if triton is None:
            raise ModuleNotFoundError("triton is not installed")
        tensors, options = (torch.int16, torch.int16, torch.bfloat16), _options(0.0, Gradient(torch.empty(0)))
        _sgd.warmup(*tensors, None, 1.0, *[0.0] * 4, 0, **options, fresh=False, nesterov=False, grid=(1,))
    except Exception as error:  # whatever it is, updates can do without
        warnings.warn(
            f"updates on the device run in plain torch, exact but many times slower: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True


# -- kernels -------------------------------------------------------------------------------------------------
# A kernel's last program takes what is left; the others need no mask, and with one their accesses would be narrow
# unless the size were a multiple of theirs.


def _jit(function: Any) -> Any:
    """Hand a function to Triton where there is one; `numel` is no part of what a kernel is compiled for."""
    return function if triton is None else triton.jit(function, do_not_specialize=["numel"])


@_jit
def _adam(
    hi: tl.tensor,
    lo: tl.tensor,
    gradient: tl.tensor,
    mean: tl.tensor,
    square: tl.tensor,
    scale: tl.tensor,
    l2: tl.tensor,
    decay: tl.tensor,
    step: tl.tensor,
    lerp: tl.tensor,
    keep: tl.tensor,
    add: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
    numel: tl.tensor,
    coupled: tl.constexpr,
    scale_is_read: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Update by AdamW or Adam; arguments are those of `Update` in the host kernel."""
    start = tl.program_id(0) * block
    lanes = tl.arange(0, block)
    at = start + lanes
    places = (hi + at, lo + at, gradient + at, mean + at, square + at)
    factor = tl.load(scale) if scale_is_read else scale
    factors = (factor, l2, decay, step, lerp, keep, add, root, eps)
    if numel - start >= block:
        _adam_lanes(places, factors, None, coupled)
    else:
        _adam_lanes(places, factors, lanes < numel - start, coupled)


@_jit
def _adam_lanes(places: tl.tuple, factors: tl.tuple, mask: tl.tensor, coupled: tl.constexpr) -> None:
    """Update the elements at `places`, all or those of `mask`."""
    hi, lo, gradient, mean, square = places
    factor, l2, decay, step, lerp, keep, add, root, eps = factors
    w = _joined(hi, lo, mask)
    g = tl.load(gradient, mask=mask).to(tl.float32) * factor
    m = tl.load(mean, mask=mask)
    v = tl.load(square, mask=mask)
    if coupled:
        g = tl.fma(l2, w, g)
    near = lerp < 0.5  # lerp starts from the nearer one, as torch.lerp does
    m = tl.fma(tl.where(near, lerp, lerp - 1.0), g - m, tl.where(near, m, g))
    v = tl.fma(add * g, g, v * keep)
    w = w * decay + tl.div_rn(step * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(mean, m, mask=mask)
    tl.store(square, v, mask=mask)
    _split(w, hi, lo, mask)


@_jit
def _sgd(
    hi: tl.tensor,
    lo: tl.tensor,
    gradient: tl.tensor,
    buffer: tl.tensor,
    scale: tl.tensor,
    l2: tl.tensor,
    step: tl.tensor,
    keep: tl.tensor,
    add: tl.tensor,
    numel: tl.tensor,
    fresh: tl.constexpr,
    nesterov: tl.constexpr,
    coupled: tl.constexpr,
    scale_is_read: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Update by SGD; arguments are those of `Update` in the host kernel, and `buffer` is None without momentum."""
    start = tl.program_id(0) * block
    lanes = tl.arange(0, block)
    at = start + lanes
    places = (hi + at, lo + at, gradient + at, None if buffer is None else buffer + at)
    factor = tl.load(scale) if scale_is_read else scale
    factors = (factor, l2, step, keep, add)
    if numel - start >= block:
        _sgd_lanes(places, factors, None, fresh, nesterov, coupled)
    else:
        _sgd_lanes(places, factors, lanes < numel - start, fresh, nesterov, coupled)


@_jit
def _sgd_lanes(
    places: tl.tuple,
    factors: tl.tuple,
    mask: tl.tensor,
    fresh: tl.constexpr,
    nesterov: tl.constexpr,
    coupled: tl.constexpr,
) -> None:
    """Update the elements at `places`, all or those of `mask`."""
    hi, lo, gradient, momentum = places
    factor, l2, step, keep, add = factors
    w = _joined(hi, lo, mask)
    g = tl.load(gradient, mask=mask).to(tl.float32) * factor
    if coupled:
        g = tl.fma(l2, w, g)
    if momentum is not None:
        b = g if fresh else tl.fma(add, g, tl.load(momentum, mask=mask) * keep)
        tl.store(momentum, b, mask=mask)
        g = tl.fma(keep, b, g) if nesterov else b
    _split(tl.fma(step, g, w), hi, lo, mask)


@_jit
def _joined(hi: tl.tensor, lo: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Return the float32 masters of the pairs at `hi` and `lo`."""
    upper = tl.load(hi, mask=mask).to(tl.int32) << 16
    return (upper + tl.load(lo, mask=mask).to(tl.int32)).to(tl.float32, bitcast=True)


@_jit
def _split(w: tl.tensor, hi: tl.tensor, lo: tl.tensor, mask: tl.tensor) -> None:
    """Store the two halves of masters; every NaN becomes the one whose halves are a NaN and 0."""
    bits = tl.where(w != w, 0x7FC00000, w.to(tl.int32, bitcast=True))
    tl.store(hi, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
    tl.store(lo, bits.to(tl.int16), mask=mask)
