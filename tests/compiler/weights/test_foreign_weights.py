"""Weights that bitsandbytes and torchao quantised: their layers, their files, and the values that these stand for."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import ArgumentError, CheckpointError
from geminifx.runtime.isa.quantized import DEQUANTIZE, NF4
from geminifx.runtime.kernels.packed import Packed, eight_bits, four_bits, torchao_int8, torchao_nf4
from geminifx.runtime.kernels.quantized import quantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

IN, OUT = 128, 192
MISSING = "it is not installed: {} is compared where somebody has it"
STATE = "weight.quant_state.bitsandbytes__nf4"


class Net(nn.Module):
    """Two frozen layers and a trained one between them."""

    def __init__(self, make: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = make(IN, OUT), nn.Linear(OUT, OUT), make(OUT, IN)
        for layer in (self.first, self.last):
            layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x))))).square().mean()


def batch() -> Tensor:
    return torch.randn(4, IN, generator=torch.Generator().manual_seed(1))


def grown(blocks: Tensor, block: int, numel: int) -> Tensor:
    return blocks.repeat_interleave(block)[:numel]


def nested_state(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Codes and a doubly quantised state as bitsandbytes writes them, and what they stand for by its definition."""
    codes, scales = quantize(weight, "nf4")
    table = torch.linspace(-1, 1, 256)
    generator = torch.Generator().manual_seed(2)
    outer = torch.rand(-(-len(scales) // 256), generator=generator) + 0.5
    inner, offset = torch.randint(0, 256, scales.shape, generator=generator, dtype=torch.uint8), 1.75
    absmax = table[inner.int()] * grown(outer, 256, len(scales)) + offset
    state = {
        "quant_type": "nf4", "blocksize": blocksize, "dtype": "float32", "shape": list(weight.shape), "absmax": inner,
        "quant_map": torch.tensor(NF4), "nested_absmax": outer, "nested_quant_map": table, "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": offset,
    }  # fmt: skip
    digits = torch.stack([codes >> 4, codes & 15], 1).view(-1)[: weight.numel()]
    values = torch.tensor(NF4)[digits.int()] * grown(absmax, blocksize, weight.numel())
    return codes, state, values.view(weight.shape)


def test_scales_that_are_quantised_are_what_they_stand_for() -> None:
    codes, state, values = nested_state(torch.randn(OUT, IN * 4))
    assert torch.equal(four_bits(codes[:, None], state).values, values)


def test_larger_blocks_share_their_scale() -> None:
    weight = torch.randn(6, 64)
    codes, scales = quantize(weight.view(3, 128), "nf4")
    state = {
        "quant_type": "nf4", "blocksize": 128, "dtype": "bfloat16", "shape": (6, 64), "absmax": scales[::2],
        "quant_map": torch.tensor(NF4),
    }  # fmt: skip
    packed = four_bits(codes, state)
    assert packed.scales.tolist() == scales[::2].repeat_interleave(2).tolist() and packed.dtype == torch.bfloat16


def save_packed(model: Net, folder: Path, damage: Callable[[dict[str, Any]], object] = lambda tensors: None) -> Net:
    """The model's files with one layer as nf4, quantised doubly, and one as int8, and a model of their values."""
    tensors = dict(model.state_dict())
    codes, state, values = nested_state(model.first.weight)
    told = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    tensors |= {f"first.weight.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    tensors[f"first.{STATE}"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    tensors["first.weight"] = codes[:, None]
    tensors["last.weight"], tensors["last.SCB"] = quantize(model.last.weight, "int8")
    tensors["last.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    dense = Net()
    dense.load_state_dict(model.state_dict())
    dense.first.weight.data.copy_(values)
    last = tensors["last.weight"], tensors["last.SCB"], "int8", list(dense.last.weight.shape), torch.float32
    dense.last.weight.data.copy_(DEQUANTIZE(*last))
    damage(tensors)
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return dense


def empty(**options: Any) -> geminifx.CompiledModule:
    with geminifx.init_empty():
        return geminifx.compile(Net(), device_budget="100MB", example_inputs=(batch(),), **options)


def test_files_are_read_as_the_values_that_they_stand_for(tmp_path: Path) -> None:
    dense = save_packed(Net(), tmp_path / "saved")
    model = empty()
    model.load_pretrained(tmp_path / "saved")
    found, expected = model.state_dict(), dense.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_codes_are_taken_over_where_weights_are_kept_as_such(tmp_path: Path) -> None:
    save_packed(Net(), tmp_path / "saved")
    model = empty(frozen="nf4")
    model.load_pretrained(tmp_path / "saved")
    saved, found = load_file(tmp_path / "saved" / "model.safetensors"), model.state_dict()
    name = "parametrizations.weight.original"
    assert torch.equal(found[f"first.{name}0"], saved["first.weight"].view(-1))
    expected = nested_state(Net().first.weight)
    assert torch.equal(found[f"first.{name}1"], four_bits(*expected[:2]).scales)
    # The other one has codes of another format: its values are quantised.
    values = DEQUANTIZE(saved["last.weight"], saved["last.SCB"], "int8", [IN, OUT], torch.float32)
    assert torch.equal(found[f"last.{name}0"], quantize(values, "nf4")[0])


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another table": (lambda t: t["first.weight.quant_map"].mul_(2), "or use a table of their own; expected nf4"),
    "small blocks": (
        lambda t: t.update({f"first.{STATE}": as_bytes({**json.loads(bytes(t[f"first.{STATE}"])), "blocksize": 32})}),
        "32 elements share a scale; expected 64 or a multiple",
    ),
    "no state": (lambda t: t.update({f"first.{STATE}": as_bytes([])}), "does not describe a weight"),
    "scales that are missing": (lambda t: t.pop("first.weight.nested_quant_map"), "first.weight in .*nested_quant_map"),
    "few codes": (lambda t: t.update({"first.weight": t["first.weight"][:-1]}), "has codes and scales of"),
    "fp4": (
        lambda t: t.update({"first.weight.quant_state.bitsandbytes__fp4": t.pop(f"first.{STATE}")}),
        "first.weight in .* is quantised as fp4; expected nf4",
    ),
    "another order": (lambda t: t["last.weight_format"].fill_(1), "does not store its codes by rows"),
}  # fmt: skip


def as_bytes(told: Any) -> Tensor:
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_are_not_understood_are_refused(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    save_packed(Net(), tmp_path / "saved", damage)
    with pytest.raises(CheckpointError, match=message):
        empty().load_pretrained(tmp_path / "saved")


# -- with the libraries --------------------------------------------------------------------------------------


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason=MISSING.format("bitsandbytes"))


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization", reason=MISSING.format("torchao"))


def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The plain model, its frozen weights with these values."""
    plain = Net()
    kept = {name: value for name, value in model.state_dict().items() if name.endswith("bias") or "middle" in name}
    plain.load_state_dict(kept, strict=False)
    for name, value in values.items():
        plain.get_submodule(name).weight.data.copy_(value)
    return plain


def same_training(model: nn.Module, plain: nn.Module) -> bool:
    compiled = geminifx.compile(model, device_budget="100MB")
    found, expected = compiled(batch()), plain(batch())
    for loss in (found, expected):
        loss.backward()
    return torch.equal(found, expected) and torch.equal(compiled.middle.weight.grad, plain.middle.weight.grad)


@pytest.mark.parametrize("doubly", [False, True])
def test_layers_of_four_bits_are_taken_over(doubly: bool, bitsandbytes: Any) -> None:
    make = lambda *size: bitsandbytes.nn.Linear4bit(*size, quant_type="nf4", compress_statistics=doubly)  # noqa: E731
    model = Net(make).to("cpu")
    values = {}
    for name in ("first", "last"):
        weight = model.get_submodule(name).weight
        values[name] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    plain = with_values(model, values)
    assert same_training(model, plain) and type(model.first).__module__.startswith("torch")
    assert not torch.equal(values["first"], Net().first.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_bitsandbytes_to_the_bit(dtype: torch.dtype, bitsandbytes: Any) -> None:
    functional = bitsandbytes.functional
    weight = torch.randn(OUT, 4 * IN, dtype=dtype)
    for doubly in (False, True):
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=doubly)
        assert torch.equal(four_bits(codes, state.as_dict()).values, functional.dequantize_4bit(codes, state))
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    expected = functional.int8_vectorwise_dequant(codes, scales)
    assert torch.equal(eight_bits(codes, scales, torch.float32).values, expected)


def test_layers_of_eight_bits_are_taken_over(bitsandbytes: Any) -> None:
    model = Net(lambda *size: bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False)).to("cpu")
    dequantised = bitsandbytes.functional.int8_vectorwise_dequant
    weights = {name: model.get_submodule(name).weight for name in ("first", "last")}
    plain = with_values(model, {name: dequantised(w.data, w.SCB) for name, w in weights.items()})
    assert same_training(model, plain)


def test_files_of_bitsandbytes_are_read(bitsandbytes: Any, tmp_path: Path) -> None:
    model = Net(lambda *size: bitsandbytes.nn.Linear4bit(*size, quant_type="nf4")).to("cpu")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    loaded = empty()
    loaded.load_pretrained(tmp_path)
    weight = model.first.weight
    expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(loaded.state_dict()["first.weight"], expected)


def test_what_is_not_quantised_yet_is_refused(bitsandbytes: Any) -> None:
    layers = bitsandbytes.nn
    refused = {
        "first is a Linear4bit whose weight is not quantised yet": lambda *size: layers.Linear4bit(*size),
        "first is a Linear8bitLt whose weight is not quantised": lambda *size: layers.Linear8bitLt(*size),
    }
    for message, make in refused.items():
        with pytest.raises(ArgumentError, match=message):
            geminifx.compile(Net(make), device_budget="100MB")
    with pytest.raises(ArgumentError, match="4-bit codes are fp4"):
        make = lambda *size: layers.Linear4bit(*size, quant_type="fp4")  # noqa: E731
        geminifx.compile(Net(make).to("cpu"), device_budget="100MB")


def test_int8_of_torchao_is_taken_over_but_for_the_last_place(torchao: Any) -> None:
    model = Net()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: name in ("first", "last"))
    weight = model.first.weight
    expected, packed = weight.dequantize(), torchao_int8(weight.data)
    assert torch.equal(packed.codes, weight.qdata)
    torch.testing.assert_close(packed.values, expected, rtol=2**-22, atol=0)
    assert same_training(model, with_values(model, {n: torchao_int8(model.get_submodule(n).weight.data).values
                                                    for n in ("first", "last")}))  # fmt: skip


def test_nf4_of_torchao_is_taken_over_up_to_the_digits_of_its_table(torchao: Any) -> None:
    weight = torch.randn(256, 256)
    tensor = torchao.NF4Tensor.from_tensor(weight, 64, 256)
    packed: Packed = torchao_nf4(tensor)
    off = (packed.values - tensor.get_original_weight()).abs().view(-1, 64).amax(1)
    assert (off <= 5.1e-5 * packed.scales).all() and off.max() > 0
