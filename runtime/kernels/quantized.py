"""The kernel of `geminifx::dequantize`, and the quantizer, in torch's operators, a piece at a time so that temporaries
stay small."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..isa.quantized import BLOCK, INT8_STEP, NF4, PIECE, Quantized, code_shapes, rows_at_a_time


@torch.library.impl("geminifx::dequantize", "CompositeExplicitAutograd")
def _dequantize(codes: Tensor, scales: Tensor, format: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    values = codes.new_empty(shape, dtype=dtype)
    if format == "int8":
        for rows in _pieces(shape[0], rows_at_a_time(tuple(shape))):
            scale = scales[rows].view(-1, *[1] * (len(shape) - 1))
            values[rows] = codes[rows].float().mul_(scale).mul_(INT8_STEP)
        return values
    pairs, flat = _pairs(codes.device), values.view(-1)
    for piece in _pieces(flat.numel(), PIECE):
        bytes_of = slice(piece.start // 2, (piece.stop + 1) // 2)
        # Without a name for it, one piece's temporary is freed before the next begins, as `workspace_bytes` counts it.
        flat[piece] = _by_blocks(
            pairs.index_select(0, codes[bytes_of].int()).view(-1)[: piece.stop - piece.start],
            scales[piece.start // BLOCK : -(-piece.stop // BLOCK)],
        )
    return values


def quantize(weight: Tensor, format: Quantized) -> tuple[Tensor, Tensor]:
    """A weight's codes and scales, with each value rounded to the nearest of the table or to the nearest step. Raises
    ValueError for values that are not finite."""
    codes_shape, scales_shape = code_shapes(format, tuple(weight.shape))
    codes = torch.empty(codes_shape, dtype=torch.int8 if format == "int8" else torch.uint8, device=weight.device)
    scales = torch.empty(scales_shape, dtype=torch.float32, device=weight.device)
    if format == "int8":
        for rows in _pieces(weight.shape[0], rows_at_a_time(tuple(weight.shape))):
            values = weight[rows].float().flatten(1)
            scales[rows] = _largest(values)
            codes[rows] = (values / _divisor(scales[rows])[:, None]).mul_(127).round_().view(weight[rows].shape).char()
    else:
        flat = weight.reshape(-1)
        for piece in _pieces(flat.numel(), PIECE):
            values = torch.zeros(-(-(piece.stop - piece.start) // BLOCK) * BLOCK, device=weight.device)
            values[: piece.stop - piece.start] = flat[piece]
            blocks = values.view(-1, BLOCK)
            into = scales[piece.start // BLOCK : -(-piece.stop // BLOCK)]
            into.copy_(_largest(blocks))
            nearest = torch.bucketize(blocks / _divisor(into)[:, None], _between(weight.device)).to(torch.uint8)
            high, low = nearest.view(-1, 2).unbind(1)
            packed = slice(piece.start // 2, (piece.stop + 1) // 2)
            codes[packed] = (high << 4 | low)[: packed.stop - packed.start]
    if not scales.isfinite().all():
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has values that are not finite, which {format} cannot "
            "represent; expected finite weights"
        )
    return codes, scales


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def _divisor(scales: Tensor) -> Tensor:
    """The scales with 1 in place of 0: the codes of rows that are all zero are 0 for any divisor."""
    return torch.where(scales == 0, 1.0, scales)


def _by_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """Multiplies flat values by the scales of their blocks, in place; the last block may be shorter."""
    whole = values.numel() // BLOCK
    values[: whole * BLOCK].view(whole, BLOCK).mul_(scales[:whole, None])
    if values.numel() > whole * BLOCK:
        values[whole * BLOCK :].mul_(scales[whole])
    return values


def _pieces(numel: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, numel)) for start in range(0, numel, length))


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two values that each byte stands for, [256, 2] in float32."""
    table, codes = torch.tensor(NF4, device=device), torch.arange(256, device=device)
    return torch.stack([table[codes >> 4], table[codes & 15]], 1)


@cache
def _between(device: torch.device) -> Tensor:
    """The midpoints between neighbouring values of the table."""
    table = torch.tensor(NF4, dtype=torch.float64)
    return ((table[1:] + table[:-1]) / 2).float().to(device)
