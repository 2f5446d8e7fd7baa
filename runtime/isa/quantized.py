"""`geminifx::dequantize`: a frozen weight from codes and scales, in the formats of bitsandbytes.

    nf4     codes uint8 [(n + 1) // 2], two to a byte, the first in the high bits: indices into a table of 16 values
            (Dettmers et al., "QLoRA", 2023); scales float32 [(n + 63) // 64], one per 64 neighbouring elements
    int8    codes int8, in the weight's shape; scales float32 [rows], the largest magnitude of each row

A value is table[code] * scale, or code * scale * (1 / 127), computed in float32 and rounded to `dtype` once. Scales are
not quantised themselves.
"""

from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

Quantized = Literal["nf4", "int8"]
"""Formats of frozen weights."""

BLOCK = 64
"""Elements that share a scale, in nf4."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of the codes 0 to 15: quantiles of a normal distribution."""

INT8_STEP = 7.874015718698502e-3
"""1 / 127, with bitsandbytes' rounding."""

PIECE = 2**22
"""Elements that are dequantised at a time: a multiple of the block."""

_PIECE_BYTES = {"nf4": 6, "int8": 4}
"""Workspace bytes per element: its float32 value and, in nf4, half of the int32 index of its byte."""

OPERATORS = ("dequantize",)
"""The operators defined in this module."""

torch.library.define(
    "geminifx::dequantize",
    "(Tensor codes, Tensor scales, str format, SymInt[] shape, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
DEQUANTIZE = torch.ops.geminifx.dequantize.default


def code_shapes(format: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a weight's codes and scales. Raises ValueError for an unknown format."""
    if format not in get_args(Quantized):
        raise ValueError(f"dequantize: format {format!r}; expected one of {', '.join(get_args(Quantized))}")
    numel = prod(shape)
    return (((numel + 1) // 2,), (-(-numel // BLOCK),)) if format == "nf4" else (tuple(shape), (shape[0],))


def rows_at_a_time(shape: tuple[int, ...]) -> int:
    """How many rows of an int8 weight are dequantised at a time."""
    return max(PIECE * shape[0] // max(prod(shape), 1), 1)


def workspace_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Bytes that dequantising a weight takes besides its values."""
    numel = prod(shape)
    at_a_time = PIECE if format == "nf4" or not shape[0] else rows_at_a_time(shape) * (numel // shape[0])
    return min(at_a_time, numel) * _PIECE_BYTES[format]


@torch.library.register_fake("geminifx::dequantize")
def _fake(codes: Tensor, scales: Tensor, format: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    expected = code_shapes(format, tuple(shape))
    if (tuple(codes.shape), tuple(scales.shape)) != expected:
        raise ValueError(
            f"dequantize: a weight of shape {tuple(shape)} in {format} has codes and scales of shapes {expected}, not "
            f"{tuple(codes.shape)} and {tuple(scales.shape)}"
        )
    return codes.new_empty(shape, dtype=dtype)


class Dequantized(nn.Module):
    """The parametrization of a weight stored as codes and scales: reading it computes its values in `dtype`. The weight
    had `dtype_before` before it was quantised."""

    def __init__(
        self, format: Quantized, shape: tuple[int, ...], dtype: torch.dtype, dtype_before: torch.dtype
    ) -> None:
        super().__init__()
        self.format, self.shape, self.dtype, self.dtype_before = format, shape, dtype, dtype_before

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        return DEQUANTIZE(codes, scales, self.format, list(self.shape), self.dtype)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is the parametrization list of a quantised weight, whose parameters are codes and scales."""
    return isinstance(module, ParametrizationList) and isinstance(module[0], Dequantized)
