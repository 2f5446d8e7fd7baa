"""Frozen weights as codes and scales, laid out as bitsandbytes lays them out."""

import pytest
import torch
from geminifx.runtime.isa import quantized as isa
from geminifx.runtime.isa.quantized import BLOCK, DEQUANTIZE, NF4, code_shapes
from geminifx.runtime.kernels import quantized
from geminifx.runtime.kernels.quantized import quantize
from torch import Tensor
from torch.testing import assert_close

SHAPES = [(64, 64), (5, 13), (3, 64), (1, 1), (2, 65), (130, 3)]


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_definition(codes: Tensor, scales: Tensor, format: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if format == "int8":
        return (codes.float() * scales[:, None] * (1 / 127)).to(dtype)
    numel = shape[0] * shape[1]
    places = [place for byte in codes.tolist() for place in (byte >> 4, byte & 15)][:numel]
    found = torch.tensor([NF4[place] for place in places]) * scales.repeat_interleave(BLOCK)[:numel]
    return found.view(shape).to(dtype)


@pytest.mark.parametrize("piece", [128, quantized.PIECE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_the_definition(
    shape: tuple[int, int], format: str, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (quantized, isa):
        monkeypatch.setattr(module, "PIECE", piece)
    weight = values(shape, dtype)
    codes, scales = quantize(weight, format)
    assert (tuple(codes.shape), tuple(scales.shape)) == code_shapes(format, shape)
    found = DEQUANTIZE(codes, scales, format, list(shape), dtype)
    assert torch.equal(found, by_definition(codes, scales, format, shape, dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest(shape: tuple[int, int]) -> None:
    weight = values(shape)
    codes, scales = quantize(weight, "nf4")
    scale = scales.repeat_interleave(BLOCK)[: weight.numel()].view(shape)
    least = (torch.tensor(NF4) * scale[..., None] - weight[..., None]).abs().amin(-1)
    off = (DEQUANTIZE(codes, scales, "nf4", list(shape), torch.float32) - weight).abs()
    assert_close(off, least, rtol=0, atol=1e-6)
    codes, scales = quantize(weight, "int8")
    assert torch.equal(weight, values(shape)), "a weight is as it was"
    assert torch.equal(scales, weight.abs().amax(1)) and codes.abs().amax(1).eq(127).all()
    off = (DEQUANTIZE(codes, scales, "int8", list(shape), torch.float32) - weight).abs()
    assert (off <= scales[:, None] / 127 * 0.5001).all()


def test_two_codes_share_a_byte_the_first_in_the_high_bits() -> None:
    codes, scales = quantize(torch.tensor([[-2.0, 2.0, 0.0]]), "nf4")
    assert codes.tolist() == [0x0F, 0x70 | codes[1].item() & 15] and scales.tolist() == [2.0]


def test_what_is_zero_stays_zero_and_what_is_not_finite_is_refused() -> None:
    for format in ("nf4", "int8"):
        zeros = torch.zeros(3, 70)
        assert torch.equal(DEQUANTIZE(*quantize(zeros, format), format, [3, 70], torch.float32), zeros)
        with pytest.raises(ValueError, match="values that are not finite"):
            quantize(torch.tensor([[1.0, torch.inf]]), format)


def test_rows_of_the_smallest_values_keep_them() -> None:
    values = torch.randn(3, 70) * 1e-38
    found = DEQUANTIZE(*quantize(values, "int8"), "int8", [3, 70], torch.float32)
    assert (found - values).abs().max() <= values.abs().max() / 200


def test_types_are_told_without_values_and_shapes_are_checked() -> None:
    codes, scales = (torch.empty(shape, dtype=kind, device="meta") for shape, kind in zip(
        code_shapes("nf4", (5, 13)), (torch.uint8, torch.float32), strict=True))  # fmt: skip
    found = DEQUANTIZE(codes, scales, "nf4", [5, 13], torch.bfloat16)
    assert found.is_meta and found.shape == (5, 13) and found.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has codes and scales of"):
        DEQUANTIZE(codes, scales, "nf4", [5, 14], torch.bfloat16)
    with pytest.raises(ValueError, match="format 'fp4'; expected one of nf4, int8"):
        DEQUANTIZE(codes, scales, "fp4", [5, 13], torch.bfloat16)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_what_dequantising_takes_besides_is_told(format: str) -> None:
    """As a device's allocator counts it, where there is one."""
    numel = 5 * 2**20
    told = isa.workspace_bytes(format, (numel // 4096, 4096))
    assert told == {"nf4": 6, "int8": 4}[format] * 4 * 2**20
    assert isa.workspace_bytes(format, (8, 64)) == {"nf4": 6, "int8": 4}[format] * 512
    assert isa.workspace_bytes(format, (0, 64)) == 0
    if torch.cuda.is_available():
        codes, scales = (tensor.cuda() for tensor in quantize(values((numel // 4096, 4096)), format))
        for _ in range(2):  # the first call makes a table that stays
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = DEQUANTIZE(codes, scales, format, [numel // 4096, 4096], torch.bfloat16)
            taken = torch.cuda.max_memory_allocated() - before - found.nbytes
            del found
        assert 0 < taken <= told + 4096
