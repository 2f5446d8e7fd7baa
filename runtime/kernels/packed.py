"""Converts quantized weights of other libraries to ours: the same codes, and float32 scales.

    bitsandbytes, 4 bits   codes as ours; scales of blocks of 64 or a multiple, which may be codes themselves (double
                           quantization): a table's value times the scale of their own block, plus an offset
    bitsandbytes, 8 bits   as ours
    torchao, int8          scales are those of one step, ours those of 127 steps
    torchao, nf4           codes as ours; scales are codes: divided by their block's factor, plus the mean of all

Weights of bitsandbytes keep their values bit for bit. torchao's tables have four digits, and its steps are rounded
differently: values differ by 5e-5 of their block's scale, or in their last place.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..isa.quantized import BLOCK, DEQUANTIZE, NF4, Quantized, code_shapes

STEPS = 127
"""Our int8 scales are the largest magnitude of a row, which is 127 steps."""


@dataclass(frozen=True)
class Packed:
    """A quantized weight of `shape`, in our format; `dtype` is that of the weight before it was quantized."""

    format: Quantized
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        expected, found = code_shapes(self.format, self.shape), (tuple(self.codes.shape), tuple(self.scales.shape))
        if found != expected:
            raise ValueError(
                f"a weight of shape {self.shape} in {self.format} has codes and scales of shapes {expected}, not "
                f"{found}"
            )

    @cached_property
    def values(self) -> Tensor:
        return DEQUANTIZE(self.codes, self.scales, self.format, list(self.shape), self.dtype)

    def __getitem__(self, at: Any) -> Tensor:
        return self.values[at]


def four_bits(codes: Tensor, state: Mapping[str, Any]) -> Packed:
    """From bitsandbytes' codes and its `QuantState.as_dict()`. Raises ValueError for a format other than nf4."""
    if state["quant_type"] != "nf4" or not torch.equal(state["quant_map"].float().cpu(), torch.tensor(NF4)):
        raise ValueError(f"4-bit codes are {state['quant_type']}, or use a table of their own; expected nf4")
    scales = state["absmax"]
    if "nested_absmax" in state:
        scales = _nested(scales, state)
    shape, dtype = tuple(map(int, state["shape"])), getattr(torch, state["dtype"])
    scales = _of_blocks(scales.float(), int(state["blocksize"]), math.prod(shape))
    return Packed("nf4", shape, dtype, codes.reshape(-1).view(torch.uint8), scales)


def eight_bits(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Packed:
    """From bitsandbytes' codes and the largest magnitudes of rows."""
    return Packed("int8", tuple(codes.shape), dtype, codes, scales.float())


def torchao_int8(weight: Any) -> Packed:
    """From an `Int8Tensor`. Raises ValueError if scales are not of rows, or zero points are not 0."""
    rows, columns = weight.shape
    zero = getattr(weight, "zero_point", None)
    if tuple(weight.block_size) != (1, columns) or (zero is not None and bool(zero.any())):
        raise ValueError(
            f"int8 codes share scales in blocks of {tuple(weight.block_size)}; expected one scale per row and no zero "
            "point"
        )
    return Packed("int8", (rows, columns), weight.dtype, weight.qdata, weight.scale.float().view(rows) * STEPS)


def torchao_nf4(weight: Any) -> Packed:
    """From an `NF4Tensor`."""
    blocks = weight.quantized_scalers.view(-1, weight.scaler_block_size)
    scales = (blocks / weight.quantization_factor[:, None]).flatten().float() + weight.scaler_mean.float()
    shape = tuple(weight.shape)
    scales = _of_blocks(scales, int(weight.block_size), math.prod(shape))
    return Packed("nf4", shape, weight.dtype, weight.quantized_data, scales)


def _nested(codes: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Dequantizes scales that are quantized themselves."""
    values = state["nested_quant_map"].float()[codes.reshape(-1).int()]
    block = int(state["nested_blocksize"])
    outer = state["nested_absmax"].float().repeat_interleave(block)[: values.numel()]
    return values.mul_(outer).add_(float(state["nested_offset"]))


def _of_blocks(scales: Tensor, block: int, numel: int) -> Tensor:
    """Repeats scales of `block` elements for each of our blocks. Raises ValueError if `block` is not a multiple."""
    if block % BLOCK:
        raise ValueError(f"{block} elements share a scale; expected {BLOCK} or a multiple of it")
    return scales.reshape(-1).repeat_interleave(block // BLOCK)[: -(-numel // BLOCK)].contiguous()
