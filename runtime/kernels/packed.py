"""Quantised weights of other libraries as ours: the same codes, and float32 scales.

    bitsandbytes, 4 bits   codes as ours; scales of blocks of 64 or a multiple, which may be codes themselves (double
                           quantisation): a table's value times the scale of their own block, and an offset
    bitsandbytes, 8 bits   ours
    torchao, int8          scales are of a step, where ours are of 127 steps
    torchao, nf4           codes as ours; scales are codes: divided by their block's factor, and the mean of all

What is read of bitsandbytes stands for the values that it stands for there, to the bit. torchao's tables have four
digits, and its steps are rounded otherwise: values differ by 5e-5 of their block's scale, and by their last place.
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


@dataclass(frozen=True)
class Packed:
    """A quantised weight, of `shape`. What was quantised is of `dtype`."""

    format: Quantized
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        expected, found = code_shapes(self.format, self.shape), (tuple(self.codes.shape), tuple(self.scales.shape))
        if found != expected:
            raise ValueError(
                f"a weight of {self.shape} as {self.format} has codes and scales of {expected}, not {found}"
            )

    @cached_property
    def values(self) -> Tensor:
        return DEQUANTIZE(self.codes, self.scales, self.format, list(self.shape), self.dtype)

    def __getitem__(self, at: Any) -> Tensor:
        return self.values[at]


def four_bits(codes: Tensor, state: Mapping[str, Any]) -> Packed:
    """Of bitsandbytes' codes and what its `QuantState.as_dict()` tells. Raises ValueError for another format."""
    if state["quant_type"] != "nf4" or not torch.equal(state["quant_map"].float().cpu(), torch.tensor(NF4)):
        raise ValueError(f"codes of 4 bits are of {state['quant_type']}, or of a table of its own; expected nf4")
    scales = state["absmax"]
    if "nested_absmax" in state:
        scales = _nested(scales, state)
    shape, dtype = tuple(map(int, state["shape"])), getattr(torch, state["dtype"])
    scales = _of_blocks(scales.float(), int(state["blocksize"]), math.prod(shape))
    return Packed("nf4", shape, dtype, codes.reshape(-1).view(torch.uint8), scales)


def eight_bits(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Packed:
    """Of bitsandbytes' codes and the largest magnitudes of rows."""
    return Packed("int8", tuple(codes.shape), dtype, codes, scales.float())


def torchao_int8(weight: Any) -> Packed:
    """Of an `Int8Tensor`. Raises ValueError where scales are not of rows, or codes are not of both signs alike."""
    rows, columns = weight.shape
    zero = getattr(weight, "zero_point", None)
    if tuple(weight.block_size) != (1, columns) or (zero is not None and bool(zero.any())):
        raise ValueError(
            f"int8 codes share scales in blocks of {tuple(weight.block_size)}; expected rows, with no zero"
        )
    return Packed("int8", (rows, columns), weight.dtype, weight.qdata, weight.scale.float().view(rows) * STEPS)


def torchao_nf4(weight: Any) -> Packed:
    """Of an `NF4Tensor`."""
    blocks = weight.quantized_scalers.view(-1, weight.scaler_block_size)
    scales = (blocks / weight.quantization_factor[:, None]).flatten().float() + weight.scaler_mean.float()
    shape = tuple(weight.shape)
    scales = _of_blocks(scales, int(weight.block_size), math.prod(shape))
    return Packed("nf4", shape, weight.dtype, weight.quantized_data, scales)


def _nested(codes: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Scales that are quantised themselves."""
    values = state["nested_quant_map"].float()[codes.reshape(-1).int()]
    block = int(state["nested_blocksize"])
    outer = state["nested_absmax"].float().repeat_interleave(block)[: values.numel()]
    return values.mul_(outer).add_(float(state["nested_offset"]))


def _of_blocks(scales: Tensor, block: int, numel: int) -> Tensor:
    """One for each of our blocks. Raises ValueError for blocks that are no multiples of them."""
    if block % BLOCK:
        raise ValueError(f"{block} elements share a scale; expected {BLOCK} or a multiple")
    return scales.reshape(-1).repeat_interleave(block // BLOCK)[: -(-numel // BLOCK)].contiguous()
