"""The device's update kernels in Triton, for all formats of moments: one pass over the memory each.

Each program takes a tile of elements, in rows that share a scale if moments are 8-bit codes. Only the last program uses
a mask, for what is left: masked accesses are narrow unless the size is a multiple of their width. The arithmetic of
updates is that of `host_updates.cpp`, the formats of moments those of `moments`.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for CPUs come without it
    triton = None

EXACT, HALF, CODES = 0, 1, 2
"""The formats of moments: float32; bfloat16, which kernels take as 16-bit integers; 8-bit codes."""


def _jit(function: Any) -> Any:
    """Compiles a function with Triton if it is installed; kernels are not specialized for the values of integers."""
    return function if triton is None else triton.jit(function, do_not_specialize=["low", "high", "first", "numel"])


def _constant(value: float) -> Any:
    """A module-level constant that kernels can read."""
    return value if triton is None else tl.constexpr(value)


_EXACT, _HALF, _CODES = _constant(EXACT), _constant(HALF), _constant(CODES)
_FACTOR, _NEXT_FACTOR = _constant(0x7FEB352D), _constant(0x846CA68B)
_SCALE_BYTES = _constant(4)
_SIGNED, _UNSIGNED = _constant(127.0), _constant(255.0)
_ONE_SIGNED, _ONE_UNSIGNED = _constant(1 / 127), _constant(1 / 255)
_NAN, _INFINITY = _constant(0x7FC00000), _constant(0x7F800000)
_TO_INTEGER, _INTEGER_BITS = _constant(1.5 * 2**23), _constant(0x4B400000)
"""Adding the first to a small number leaves no bits for a fraction: the sum's bits exceed the second by the nearest
integer, with ties to even."""


@_jit
def adam(
    hi: tl.tensor,
    lo: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    first: tl.tensor,
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
    stored: tl.constexpr,
    coupled: tl.constexpr,
    scale_is_read: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """Updates by AdamW or Adam. Arguments are those of `Update` in the host kernel; `lo` is None if masters are
    rounded."""
    start = tl.program_id(0) * rows * columns
    at = _elements(start, rows, columns)
    pointers = (hi + at, None if lo is None else lo + at, gradient + at)
    draws = (low, high, first + at)
    mean_at = (_values_at(mean, start, stored, rows, columns), _scales_at(mean, start, stored, rows, columns))
    square_at = (_values_at(square, start, stored, rows, columns), _scales_at(square, start, stored, rows, columns))
    factor = tl.load(scale) if scale_is_read else scale
    factors = (factor, l2, decay, step, lerp, keep, add, root, eps)
    if numel - start >= rows * columns:
        _adam_tile(pointers, draws, mean_at, square_at, factors, None, None, stored, coupled)
    else:
        row_mask = start + tl.arange(0, rows)[:, None] * columns < numel
        _adam_tile(pointers, draws, mean_at, square_at, factors, at < numel, row_mask, stored, coupled)


@_jit
def _adam_tile(
    pointers: tl.tuple,
    draws: tl.tuple,
    mean: tl.tuple,
    square: tl.tuple,
    factors: tl.tuple,
    mask: tl.tensor,
    row_mask: tl.tensor,
    stored: tl.constexpr,
    coupled: tl.constexpr,
) -> None:
    """Updates the elements at `pointers`: all, or those in `mask`; `row_mask` has the rows that contain any of them."""
    hi, lo, gradient = pointers
    factor, l2, decay, step, lerp, keep, add, root, eps = factors
    w = _joined(hi, lo, mask)
    g = tl.load(gradient, mask=mask).to(tl.float32) * factor
    m = _widened(mean, mask, row_mask, stored, False)
    v = _widened(square, mask, row_mask, stored, True)
    if coupled:
        g = tl.fma(l2, w, g)
    near = lerp < 0.5  # lerp starts from the nearer one, as torch.lerp does
    m = tl.fma(tl.where(near, lerp, lerp - 1.0), g - m, tl.where(near, m, g))
    v = tl.fma(add * g, g, v * keep)
    w = w * decay + tl.div_rn(step * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    _narrow(m, mean, mask, row_mask, stored, False)
    _narrow(v, square, mask, row_mask, stored, True)
    _split(w, hi, lo, draws, mask)


@_jit
def sgd(
    hi: tl.tensor,
    lo: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    first: tl.tensor,
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
    stored: tl.constexpr,
    coupled: tl.constexpr,
    scale_is_read: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """Updates by SGD. Arguments are those of `Update` in the host kernel; `lo` is None if masters are rounded, `buffer`
    without momentum."""
    start = tl.program_id(0) * rows * columns
    at = _elements(start, rows, columns)
    pointers = (hi + at, None if lo is None else lo + at, gradient + at)
    draws = (low, high, first + at)
    if buffer is None:
        momentum = None
    else:
        momentum = (_values_at(buffer, start, stored, rows, columns), _scales_at(buffer, start, stored, rows, columns))
    factor = tl.load(scale) if scale_is_read else scale
    factors = (factor, l2, step, keep, add)
    if numel - start >= rows * columns:
        _sgd_tile(pointers, draws, momentum, factors, None, None, fresh, nesterov, stored, coupled)
    else:
        row_mask = start + tl.arange(0, rows)[:, None] * columns < numel
        _sgd_tile(pointers, draws, momentum, factors, at < numel, row_mask, fresh, nesterov, stored, coupled)


@_jit
def _sgd_tile(
    pointers: tl.tuple,
    draws: tl.tuple,
    momentum: tl.tuple,
    factors: tl.tuple,
    mask: tl.tensor,
    row_mask: tl.tensor,
    fresh: tl.constexpr,
    nesterov: tl.constexpr,
    stored: tl.constexpr,
    coupled: tl.constexpr,
) -> None:
    """Updates the elements at `pointers`: all, or those in `mask`; `row_mask` has the rows that contain any of them."""
    hi, lo, gradient = pointers
    factor, l2, step, keep, add = factors
    w = _joined(hi, lo, mask)
    g = tl.load(gradient, mask=mask).to(tl.float32) * factor
    if coupled:
        g = tl.fma(l2, w, g)
    if momentum is not None:
        b = g if fresh else tl.fma(add, g, _widened(momentum, mask, row_mask, stored, False) * keep)
        _narrow(b, momentum, mask, row_mask, stored, False)
        g = tl.fma(keep, b, g) if nesterov else b
    _split(tl.fma(step, g, w), hi, lo, draws, mask)


@_jit
def lion(
    hi: tl.tensor,
    lo: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    first: tl.tensor,
    gradient: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    decay: tl.tensor,
    step: tl.tensor,
    keep: tl.tensor,
    add: tl.tensor,
    mix_keep: tl.tensor,
    mix_add: tl.tensor,
    numel: tl.tensor,
    stored: tl.constexpr,
    scale_is_read: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """Updates by Lion. Arguments are those of `Update` in the host kernel; `lo` is None if masters are rounded."""
    start = tl.program_id(0) * rows * columns
    at = _elements(start, rows, columns)
    pointers = (hi + at, None if lo is None else lo + at, gradient + at)
    draws = (low, high, first + at)
    mean_at = (_values_at(mean, start, stored, rows, columns), _scales_at(mean, start, stored, rows, columns))
    factor = tl.load(scale) if scale_is_read else scale
    factors = (factor, decay, step, keep, add, mix_keep, mix_add)
    if numel - start >= rows * columns:
        _lion_tile(pointers, draws, mean_at, factors, None, None, stored)
    else:
        row_mask = start + tl.arange(0, rows)[:, None] * columns < numel
        _lion_tile(pointers, draws, mean_at, factors, at < numel, row_mask, stored)


@_jit
def _lion_tile(
    pointers: tl.tuple,
    draws: tl.tuple,
    mean: tl.tuple,
    factors: tl.tuple,
    mask: tl.tensor,
    row_mask: tl.tensor,
    stored: tl.constexpr,
) -> None:
    """Updates the elements at `pointers`: all, or those in `mask`; `row_mask` has the rows that contain any of them."""
    hi, lo, gradient = pointers
    factor, decay, step, keep, add, mix_keep, mix_add = factors
    w = _joined(hi, lo, mask)
    g = tl.load(gradient, mask=mask).to(tl.float32) * factor
    m = _widened(mean, mask, row_mask, stored, False)
    mixed = tl.fma(mix_add, g, m * mix_keep)
    sign = tl.where(mixed > 0.0, 1.0, tl.where(mixed < 0.0, -1.0, tl.where(mixed != mixed, mixed, 0.0)))
    _narrow(tl.fma(add, g, m * keep), mean, mask, row_mask, stored, False)
    _split(w * decay + step * sign, hi, lo, draws, mask)


# -- places ------------------------------------------------------------------------------------------------


@_jit
def _elements(start: tl.tensor, rows: tl.constexpr, columns: tl.constexpr) -> tl.tensor:
    """The indices of a tile's elements: a vector if it is one row, else [rows, columns]."""
    if rows == 1:
        at = start + tl.arange(0, columns)
    else:
        at = start + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    return at


@_jit
def _values_at(
    moment: tl.tensor, start: tl.tensor, stored: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
) -> tl.tensor:
    """Pointers to a tile's values of a moment."""
    codes = _row(moment, start, rows, columns) + tl.arange(0, columns)[None, :]
    return codes if stored == _CODES else moment + _elements(start, rows, columns)


@_jit
def _scales_at(
    moment: tl.tensor, start: tl.tensor, stored: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
) -> tl.tensor:
    """Pointers to the scale of each row, if moments are codes."""
    scales = _row(moment, start, rows, columns) + columns
    return scales.to(tl.pointer_type(tl.float32)) if stored == _CODES else moment


@_jit
def _row(moment: tl.tensor, start: tl.tensor, rows: tl.constexpr, columns: tl.constexpr) -> tl.tensor:
    """Pointers to where each row's codes begin; its scale follows them."""
    return moment + (start // columns + tl.arange(0, rows))[:, None] * (columns + _SCALE_BYTES)


# -- values ------------------------------------------------------------------------------------------------


@_jit
def _joined(hi: tl.tensor, lo: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Returns the float32 masters of the pairs at `hi` and `lo`, or of `hi` alone."""
    bits = tl.load(hi, mask=mask).to(tl.int32) << 16
    if lo is not None:
        bits += tl.load(lo, mask=mask).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@_jit
def _split(w: tl.tensor, hi: tl.tensor, lo: tl.tensor, draws: tl.tuple, mask: tl.tensor) -> None:
    """Stores the two halves of masters, or rounds to the upper one; every NaN becomes the one with bits 0x7fc00000."""
    bits = w.to(tl.int32, bitcast=True)
    if lo is None:
        low, high, element = draws
        tl.store(hi, (tl.where(w != w, _NAN, bits + _chance(low, high, element)) >> 16).to(tl.int16), mask=mask)
    else:
        bits = tl.where(w != w, _NAN, bits)
        tl.store(hi, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
        tl.store(lo, bits.to(tl.int16), mask=mask)


@_jit
def _chance(low: tl.tensor, high: tl.tensor, element: tl.tensor) -> tl.tensor:
    """Returns 16 random bits for each element, as `rounding.chance` does."""
    x = (element + low).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * _FACTOR ^ high.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 15)) * _NEXT_FACTOR
    return ((x ^ (x >> 16)) >> 16).to(tl.int32)


@_jit
def _widened(
    places: tl.tuple, mask: tl.tensor, row_mask: tl.tensor, stored: tl.constexpr, squares: tl.constexpr
) -> tl.tensor:
    """Returns the float32 values of a moment."""
    at, scale = places
    if stored == _EXACT:
        x = tl.load(at, mask=mask)
    elif stored == _HALF:
        x = (tl.load(at, mask=mask).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif squares:
        x = tl.load(at, mask=row_mask).to(tl.float32) * _ONE_UNSIGNED * tl.load(scale, mask=row_mask)
        x = x * x
    else:
        codes = tl.load(at, mask=row_mask).to(tl.int8, bitcast=True)
        x = codes.to(tl.float32) * _ONE_SIGNED * tl.load(scale, mask=row_mask)
    return x


@_jit
def _narrow(
    x: tl.tensor,
    places: tl.tuple,
    mask: tl.tensor,
    row_mask: tl.tensor,
    stored: tl.constexpr,
    squares: tl.constexpr,
) -> None:
    """Stores the values of a moment."""
    at, scale = places
    if stored == _EXACT:
        tl.store(at, x, mask=mask)
    elif stored == _HALF:
        bits = x.to(tl.int32, bitcast=True)
        rounded = tl.where(x != x, _NAN, bits + 0x7FFF + ((bits >> 16) & 1))  # to nearest, ties to even
        tl.store(at, (rounded >> 16).to(tl.int16), mask=mask)
    else:
        x = x if mask is None else tl.where(mask, x, 0.0)
        _encode(tl.sqrt_rn(x) if squares else x, at, scale, row_mask, squares)


@_jit
def _encode(x: tl.tensor, at: tl.tensor, scale: tl.tensor, row_mask: tl.tensor, squares: tl.constexpr) -> None:
    """Stores values, or the roots of squares, as codes, and the scale of each row."""
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # magnitudes are in the order of their bits
    most = tl.max(size, axis=1, keep_dims=True)
    is_finite = most < _INFINITY
    shared = tl.where(is_finite, most, _NAN).to(tl.float32, bitcast=True)
    scaled = tl.div_rn(x, tl.where(most > 0, shared, 1.0)) * (_UNSIGNED if squares else _SIGNED)
    code = (scaled + _TO_INTEGER).to(tl.int32, bitcast=True) - _INTEGER_BITS
    if squares:
        code = tl.where((x > 0.0) & (code < 1), 1, code)
    tl.store(at, tl.where(is_finite, code, 0).to(tl.uint8), mask=row_mask)
    tl.store(scale, shared, mask=row_mask)
