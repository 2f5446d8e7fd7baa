"""Frozen weights as codes and scales: the bits of plain modules that hold the dequantised values, in a quarter of the
bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.weights.incoming import _Codes
from geminifx.compiler.weights.quantized_weights import QuantizedWeight
from geminifx.runtime.isa.errors import StateError
from geminifx.runtime.isa.quantized import DEQUANTIZE, Dequantized
from geminifx.runtime.kernels.quantized import quantize
from geminifx.runtime.memory.stored import Stored
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("shared")

WIDTH, DEPTH = 128, 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Adapted(nn.Module):
    """Frozen layers, each with a small trained one beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"base": nn.Linear(WIDTH, WIDTH), "beside": nn.Linear(WIDTH, WIDTH, bias=False)})
            for _ in range(DEPTH)
        )
        for layer in self.layers:
            layer["base"].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer["base"](x) + layer["beside"](x))
        return x.float().square().mean()


def rounded(format: str, precision: str) -> nn.Module:
    """The same with the dequantised values in its frozen weights."""
    model = Adapted()
    for layer in model.layers:
        weight = layer["base"].weight
        values = DEQUANTIZE(*quantize(weight, format), format, [WIDTH, WIDTH], DTYPES[precision])
        weight.data.copy_(values)
    return model


def batch(step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def compiled(model: nn.Module, **options: Any) -> geminifx.CompiledModule:
    return geminifx.compile(model, device="cpu", **{"precision": "bf16", **options})


def trained(model: nn.Module, ours: bool = True) -> list[Tensor]:
    optimizer = model.optimizer(AdamW, lr=1e-2) if ours else AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        losses.append(model(batch(step)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *(value for name, value in model.state_dict().items() if "beside" in name)]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "torch's"])
@pytest.mark.parametrize(
    "options",
    [
        {"placement": "cpu", "recompute": "none"},
        {"placement": "cuda", "recompute": "all"},
        {"placement": "cpu", "recompute": "all", "precision": "fp32"},
        {"placement": "auto", "microbatches": 2, "recompute": "none"},
    ],
    ids=["streamed", "resident and recomputed", "float32", "microbatches"],
)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_training_is_that_of_the_dequantised_weights(format: str, options: dict[str, Any], ours: bool) -> None:
    model = compiled(Adapted(), frozen=format, **options)
    found = trained(model, ours)
    expected = trained(compiled(rounded(format, options.get("precision", "bf16")), **options), ours)
    assert all(map(torch.equal, found, expected))
    assert f"geminifx.dequantize(weight_original0, weight_original1, '{format}'" in model.graph["training"]


def test_plain_pytorch_trains_alike() -> None:
    plain, model = rounded("nf4", "fp32"), compiled(Adapted(), frozen="nf4", precision="fp32", placement="cpu")
    optimizer = AdamW(plain.parameters(), lr=1e-2)
    for step, found in zip(range(3), trained(model), strict=False):
        loss = plain(batch(step))
        assert_close(found, loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert step or torch.equal(found, loss)


@pytest.mark.parametrize(("format", "taken"), [("nf4", 0.5 + 4 / 64), ("int8", 1 + 4 / WIDTH)])
def test_planned_and_held_are_codes_and_scales(format: str, taken: float) -> None:
    model = compiled(Adapted(), frozen=format, placement="cpu", example_inputs=(batch(0),))
    model.optimizer(AdamW)
    model(batch(0)).backward()
    homes = model.plan.homes
    frozen = [chunk for chunk in model.plan.layout.chunks if not chunk.trainable]
    kept = sum(model.plan.format.host_bytes(c, homes[c.index]) for c in frozen if "original" in c.slots[0].name)
    assert kept / (DEPTH * WIDTH * WIDTH) == pytest.approx(taken, rel=0.02)
    assert model.stats.host_peak_bytes <= model.plan.estimate.host_bytes
    assert model.stats.device_peak_bytes <= model.plan.peak_bytes
    # Between forward and backward there is no dequantised weight.
    dense = compiled(rounded(format, "bf16"), placement="cpu", recompute="none", example_inputs=(batch(0),))
    assert model.plan.peak_bytes <= dense.plan.peak_bytes + 6 * WIDTH * WIDTH


def test_evaluation_and_checkpoints(tmp_path: Path) -> None:
    model = compiled(Adapted(), frozen="nf4", placement="cpu")
    optimizer = model.optimizer(AdamW, lr=1e-2)
    model(batch(0)).backward()
    optimizer.step()
    geminifx.save_checkpoint(model, optimizer, tmp_path)
    with geminifx.init_empty():
        other = compiled(Adapted(), frozen="nf4", placement="cpu", example_inputs=(batch(0),))
    again = other.optimizer(AdamW, lr=1e-2)
    geminifx.load_checkpoint(other, again, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(batch(1)), model(batch(1)))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_files_are_read_into_codes_and_codes_saved_as_values(tmp_path: Path, format: str) -> None:
    geminifx.compile(Adapted(), device="cpu", example_inputs=(batch(0),)).save_pretrained(tmp_path / "dense")
    with geminifx.init_empty():
        empty = Adapted()
    model = compiled(empty, frozen=format, placement="cpu", example_inputs=(batch(0),))
    model.load_pretrained(tmp_path / "dense")
    other = compiled(Adapted(), frozen=format, placement="cpu", example_inputs=(batch(0),))
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    model.save_pretrained(tmp_path / "values")
    saved, values = load_file(tmp_path / "values" / "model.safetensors"), rounded(format, "bf16").state_dict()
    assert saved.keys() == values.keys() and all(torch.equal(saved[name].float(), values[name]) for name in values)
    with geminifx.init_empty():
        empty = Adapted()
    with pytest.raises(StateError, match="some weights of this model are quantised"):
        compiled(empty, frozen=format).initialize()


def test_weights_of_other_stages_are_not_read() -> None:
    class Unread:
        def __getitem__(self, place: Any) -> Tensor:
            raise AssertionError("nothing of it is kept here")

    elsewhere = Stored.of(torch.empty(0), (WIDTH, WIDTH), ())
    kept = QuantizedWeight("codes", "scales", Dequantized("nf4", (WIDTH, WIDTH), torch.float32, torch.float32))
    _Codes(kept, elsewhere, elsewhere).take("weight", Unread())


def test_a_quantised_model_is_compiled_again_for_another_precision() -> None:
    source = Adapted()
    compiled(source, frozen="nf4")
    for options in ({}, {"frozen": "nf4"}):
        found = compiled(source, precision="fp32", placement="cpu", **options)(batch(0))
        assert torch.equal(found, compiled(rounded("nf4", "fp32"), precision="fp32", placement="cpu")(batch(0)))


def test_hugging_faces_models_generate_and_are_saved_for_transformers(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    source = LlamaForCausalLM(config)
    source.model.requires_grad_(False)
    model = compiled(source, frozen="nf4", precision="fp32").eval()
    ids = torch.arange(4)[None]
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(model(ids).logits, loaded(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), loaded.generate(ids, **options))


def test_weights_that_are_trained_or_tied_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False))
    model[3].weight = model[0].weight
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    geminifx.compile(model, frozen="int8")
    assert [name for name, p in model.named_parameters() if not p.dtype.is_floating_point] == [
        "1.parametrizations.weight.original0"
    ]


def test_codes_of_one_format_are_not_asked_for_as_anothers() -> None:
    source = Adapted()
    geminifx.compile(source, frozen="nf4")
    with pytest.raises(ValueError, match="are already quantised as nf4"):
        geminifx.compile(source, frozen="int8")


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match=r"frozen weights of nn.Linear, but the model has none"):
        geminifx.compile(nn.Linear(3, 3), frozen="nf4")
    with pytest.raises(ValueError, match=r"frozen='nf5'; expected one of .*did you mean 'nf4'"):
        geminifx.compile(nn.Linear(3, 3), frozen="nf5")
    with pytest.raises(ValueError, match="does not support sharded tensors yet"):
        geminifx.compile(Adapted(), frozen="nf4", world_size=2, parallel={"tensor": "1d:2"})
    broken = Adapted()
    broken.layers[2]["base"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.2.base: .*not finite"):
        geminifx.compile(broken, frozen="int8")


def broken() -> Adapted:
    model = Adapted()
    model.layers[2]["base"].weight.data[0, 0] = torch.nan
    return model


FAILING: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception]]] = {
    "nothing fits": (Adapted, {"device_budget": 1000, "example_inputs": (batch(0),)}, geminifx.BudgetError),
    "the last weight is not finite": (broken, {}, ValueError),
    "other inputs": (Adapted, {"example_inputs": (torch.ones(2, 3),)}, ValueError),
}


@pytest.mark.parametrize("why", FAILING)
def test_a_model_whose_compilation_fails_has_its_weights_back(why: str) -> None:
    build, options, error = FAILING[why]
    source = build()
    before, parts = list(source.named_parameters()), list(map(type, source.modules()))
    values = [parameter.detach().clone() for _, parameter in before]
    with pytest.raises(error):
        geminifx.compile(source, frozen="nf4", device="cpu", **options)
    assert list(map(type, source.modules())) == parts
    for (name, found), (expected, parameter), value in zip(source.named_parameters(), before, values, strict=True):
        assert name == expected and found is parameter and torch.equal(found.nan_to_num(), value.nan_to_num())


def test_codes_of_an_earlier_compilation_stay_as_they_were_where_another_fails() -> None:
    source = Adapted()
    compiled(source, frozen="nf4", precision="fp32")
    expected = source(batch(0)).detach()
    with pytest.raises(geminifx.BudgetError):
        geminifx.compile(source, precision="bf16", device="cpu", device_budget=1000, example_inputs=(batch(0),))
    assert torch.equal(source(batch(0)), expected)
