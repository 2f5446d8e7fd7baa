"""Optimizer updates over split pairs, and sums of gradients, on the host, at the speed of its memory.

One C++ source, built on first use, holds a variant for each instruction set; plain torch stands in if it cannot be
built. All agree bit for bit, for any number of threads: with `torch.optim.SGD(foreach=False)` on float32 masters, and
with `torch.optim.AdamW` and `Adam` except for the square root, which is correctly rounded here and may be off by one
unit in the last place in torch. Calls release the GIL.
"""

import ctypes
import threading
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import reference_updates
from .build import KernelBuildError, load
from .split_pairs import SplitPair
from .update_rules import (
    GRADIENT_DTYPES,
    STORED_DTYPES,
    AdamHyper,
    AdamMoments,
    Gradient,
    LionHyper,
    Scalars,
    SgdHyper,
    check_momentum,
    check_sum,
    check_update,
    choose_variant,
)

SOURCE = Path(__file__).with_name("host_updates.cpp")
TORCH = "torch"
"""The variant that needs no compiler."""

_COMPILED = {"avx512": 2, "avx2": 1, "plain": 0}
_ADAM, _SGD, _LION = 0, 1, 2
_KINDS = {dtype: number for number, dtype in enumerate(GRADIENT_DTYPES)}
_STORED = {dtype: number for number, dtype in enumerate(STORED_DTYPES)}
_READ = ("hi", "lo", "first", "second")
_WRITTEN = ("new_hi", "new_lo", "new_first", "new_second")
_loading = threading.Lock()


class _Update(ctypes.Structure):
    """The C++ source's `Update`, field by field."""

    _fields_ = (
        ("n", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("hi", "lo", "gradient", "first", "second", *_WRITTEN)),
        *((name, ctypes.c_int32) for name in ("rule", "kind", "stored", "threads")),
        *(
            (name, ctypes.c_float)
            for name in ("scale", "l2", "decay", "step", "lerp", "keep", "add", "root", "eps", "mix_keep", "mix_add")
        ),
        *((name, ctypes.c_int32) for name in ("fresh", "nesterov")),
        *((name, ctypes.c_uint32) for name in ("low", "high", "element")),
    )


class _Sum(ctypes.Structure):
    """The C++ source's `Sum`, field by field."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("total", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("fresh", ctypes.c_int32),
    )


def available_variants() -> tuple[str, ...]:
    """Returns the variants that run on this machine, the fastest first.

    Builds the library on the first call. If it cannot be built, warns once, and only torch is left.
    """
    library = _library()
    if library is None:
        return (TORCH,)
    return (*(name for name, number in _COMPILED.items() if library.geminifx_supported(number)), TORCH)


Pieces = tuple[SplitPair, tuple[Tensor, ...]]
"""A pair and its moments, to be written to instead of those that are read."""


class HostKernel:
    """One variant of the updates.

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
        return self.variant != TORCH

    def adam(self, pair: SplitPair, gradient: Gradient, moments: AdamMoments, hyper: AdamHyper, threads: int,
             into: Pieces | None = None) -> None:  # fmt: skip
        """Updates `pair` and `moments` by AdamW or Adam on `threads` threads: in place or, if `into` is given, into its
        pair and moments, leaving what is read as it is.

        Tensors are contiguous, of equal size and on the host, at any alignment, and do not overlap. If the variant
        `widens`, moments may be stored in any format, the same for both.

        Raises:
            ValueError: a tensor has another size, dtype, device or layout, or `threads` is below 1.
        """
        state = (moments.mean, moments.square)
        _check(pair, gradient, state, threads, into, self.widens)
        if self.variant == TORCH:
            pair, state = _copied(pair, state, into)
            flat = AdamMoments(*(moment.view(-1) for moment in state))
            reference_updates.adam(pair.flat(), _flat_gradient(gradient), flat, hyper)
        else:
            self._run(_update(_ADAM, pair, gradient, state, hyper.scalars(), into), threads)

    def sgd(self, pair: SplitPair, gradient: Gradient, buffer: Tensor | None, hyper: SgdHyper, threads: int,
            into: Pieces | None = None) -> None:  # fmt: skip
        """Updates `pair` and the momentum `buffer` by SGD on `threads` threads, in place or `into` other tensors.

        `buffer` is None if and only if `hyper.momentum` is 0. Tensors are as for `adam`.

        Raises:
            ValueError: as for `adam`, or momentum without a buffer, or a buffer without momentum.
        """
        check_momentum(buffer, hyper)
        state = () if buffer is None else (buffer,)
        _check(pair, gradient, state, threads, into, self.widens)
        if self.variant == TORCH:
            pair, state = _copied(pair, state, into)
            reference_updates.sgd(pair.flat(), _flat_gradient(gradient), state[0].view(-1) if state else None, hyper)
            return
        update = _update(_SGD, pair, gradient, state, hyper.scalars(), into)
        update.fresh, update.nesterov = hyper.first, hyper.nesterov
        self._run(update, threads)

    def lion(self, pair: SplitPair, gradient: Gradient, mean: Tensor, hyper: LionHyper, threads: int,
             into: Pieces | None = None) -> None:  # fmt: skip
        """Updates `pair` and `mean` by Lion on `threads` threads, in place or `into` other tensors. Tensors are as for
        `adam`.

        Raises:
            ValueError: as for `adam`.
        """
        _check(pair, gradient, (mean,), threads, into, self.widens)
        if self.variant == TORCH:
            pair, (mean,) = _copied(pair, (mean,), into)
            reference_updates.lion(pair.flat(), _flat_gradient(gradient), mean.view(-1), hyper)
        else:
            self._run(_update(_LION, pair, gradient, (mean,), hyper.scalars(), into), threads)

    def add(self, total: Tensor, gradient: Gradient, threads: int, *, fresh: bool) -> None:
        """Adds a gradient times its scale to the float32 `total`, in place, on `threads` threads; if `fresh`,
        overwrites `total` with that product. Both are contiguous, on the host, and of equal length.

        Raises:
            ValueError: a tensor of another dtype, device, layout or length, or `threads` is below 1.
        """
        check_sum(total, gradient, threads)
        if self.variant == TORCH:
            reference_updates.add(total.view(-1), _flat_gradient(gradient), fresh)
            return
        values = gradient.values
        job = _Sum(n=total.numel(), total=total.data_ptr(), gradient=values.data_ptr(), kind=_KINDS[values.dtype],
                   threads=threads, scale=float(gradient.scale), fresh=fresh)  # fmt: skip
        library = _library()
        if library is None or library.geminifx_add(ctypes.byref(job), _COMPILED[self.variant]):
            raise RuntimeError(f"the host kernel's variant {self.variant} refused a sum; please report this")

    def _run(self, update: _Update, threads: int) -> None:
        """Calls the library, which is loaded by now."""
        library = _library()
        update.threads = threads
        if library is None or library.geminifx_update(ctypes.byref(update), _COMPILED[self.variant]):
            raise RuntimeError(f"the host kernel's variant {self.variant} refused an update; please report this")


def _library() -> ctypes.CDLL | None:
    """Returns the library, or None after one warning; threads that ask at once build it once."""
    with _loading:
        return _load_once()


@cache
def _load_once() -> ctypes.CDLL | None:
    try:
        library = load(SOURCE)
    except KernelBuildError as error:
        warnings.warn(
            f"updates on the host run in plain torch, which is exact but many times slower: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    library.geminifx_supported.argtypes = [ctypes.c_int]
    library.geminifx_update.argtypes = [ctypes.POINTER(_Update), ctypes.c_int]
    library.geminifx_add.argtypes = [ctypes.POINTER(_Sum), ctypes.c_int]
    return library


def _update(rule: int, pair: SplitPair, gradient: Gradient, state: tuple[Tensor, ...], scalars: Scalars,
            into: Pieces | None) -> _Update:  # fmt: skip
    """Returns the arguments of one call; ctypes rounds the factors to float32."""
    update = _Update(n=pair.hi.numel(), rule=rule, kind=_KINDS[gradient.values.dtype], scale=float(gradient.scale))
    update.stored = _STORED[state[0].dtype] if state else 0
    update.gradient = gradient.values.data_ptr()
    new_pair, new_state = (pair, state) if into is None else into
    read, written = (pair.hi, pair.lo, *state), (new_pair.hi, new_pair.lo, *new_state)
    for names, tensors in ((_READ, read), (_WRITTEN, written)):
        for name, tensor in zip(names, tensors, strict=False):
            setattr(update, name, None if tensor is None else tensor.data_ptr())
    if pair.draws is not None:
        (update.low, update.high), update.element = pair.draws.halves, pair.draws.first
    for name, value in vars(scalars).items():
        setattr(update, name, value)
    return update


def _check(pair: SplitPair, gradient: Gradient, state: tuple[Tensor, ...], threads: int, into: Pieces | None,
           widens: bool) -> None:  # fmt: skip
    """Raises ValueError for what the library would read or write out of bounds, or misinterpret."""
    if threads < 1:
        raise ValueError(f"an update needs at least one thread, not {threads}")
    check_update(pair, gradient, state, torch.device("cpu"), widens=widens)
    if into is not None:
        if len(into[1]) != len(state) or [t.numel() for t in into[0].tensors] != [t.numel() for t in pair.tensors]:
            raise ValueError(
                f"an update of {pair.hi.numel()} weights and {len(state)} moments must be written to tensors of the "
                "same sizes"
            )
        check_update(into[0], gradient, into[1], torch.device("cpu"), widens=widens)
        if any(old.dtype != new.dtype for old, new in zip(state, into[1], strict=True)):
            raise ValueError("an update must store moments in the format in which it reads them")


def _copied(pair: SplitPair, state: tuple[Tensor, ...], into: Pieces | None) -> Pieces:
    """Returns the tensors to update in place: the given ones, or `into` after copying them there."""
    if into is None:
        return pair, state
    for target, source in zip((*into[0].tensors, *into[1]), (*pair.tensors, *state), strict=True):
        target.copy_(source)
    return into


def _flat_gradient(gradient: Gradient) -> Gradient:
    return Gradient(gradient.values.detach().view(-1), float(gradient.scale))
