"""Weights that are read right into chunks and written a file at a time: the same values, and never a second copy."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler import pretrained
from geminifx.models.presets import load_model
from geminifx.runtime.isa.errors import CheckpointError, StateError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel

pytestmark = pytest.mark.usefixtures("shared")

CONFIGS = {
    "tied": OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99, word_embed_proj_dim=32,
        max_position_embeddings=32, dropout=0.0,
    ),
    "untied": LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
IDS = torch.arange(20).view(2, 10)


def saved(directory: Path, kind: str = "tied", dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """What transformers loads of the files."""
    AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32).to(dtype).save_pretrained(directory, **options)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()


def one_file(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def same(state: dict[str, Tensor], model: nn.Module) -> bool:
    own = model.state_dict()
    return state.keys() == own.keys() and all(torch.equal(state[name], value) for name, value in own.items())


@pytest.mark.parametrize("size", ["20kB", "1GB"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "torch's"])
def test_files_are_trained_from_as_the_model_that_transformers_loads(
    tmp_path: Path, kind: str, size: str, ours: bool
) -> None:
    """The files are bfloat16, and the masters float32."""
    plain = saved(tmp_path, kind, torch.bfloat16, max_shard_size=size)
    with torch.no_grad():
        expected = plain(input_ids=IDS, labels=IDS).loss
    model = geminifx.from_pretrained(str(tmp_path), "1GB", placement="cpu")
    assert all(parameter.is_meta for parameter in model.parameters()), "nothing is read as yet"
    states = []
    for each in (model, geminifx.compile(plain, "1GB", placement="cpu")):
        optimizer = each.optimizer(AdamW, lr=1e-2) if ours else AdamW(each.parameters(), lr=1e-2)
        losses = []
        for _ in range(2):
            losses.append(each(input_ids=IDS, labels=IDS).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(losses[0], expected)
        states.append(each.state_dict())
    assert states[0].keys() == states[1].keys() and all(map(torch.equal, *(state.values() for state in states)))


def test_a_state_is_read_before_there_was_a_call(tmp_path: Path) -> None:
    plain = saved(tmp_path)
    assert same(geminifx.from_pretrained(tmp_path).state_dict(), plain)
    model = geminifx.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict(), plain)


def test_a_model_made_empty_is_filled_buffers_included(tmp_path: Path) -> None:
    build = lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 3))  # noqa: E731
    x, plain = torch.randn(5, 3, 2), build()
    plain(x)
    geminifx.compile(plain, example_inputs=(x,)).save_pretrained(tmp_path)
    with geminifx.init_empty():
        model = geminifx.compile(build(), example_inputs=(x,))
    model.load_pretrained(tmp_path)
    assert torch.equal(model(x), plain(x)) and same(model.state_dict(), plain)
    with pytest.raises(StateError, match=r"load_pretrained\(\) is for weights on 'meta'"):
        model.load_pretrained(tmp_path)


def test_files_of_the_model_without_its_head_and_with_one_more_prefix(tmp_path: Path) -> None:
    plain = saved(tmp_path)
    rewrite(tmp_path, {name.removeprefix("model."): value for name, value in one_file(tmp_path).items()})
    assert same(geminifx.from_pretrained(tmp_path).state_dict(), plain)


def test_one_file_wins_over_the_index_of_a_former_model(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20kB")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    del weights["lm_head.weight"]
    rewrite(tmp_path, {name: value + 1 for name, value in weights.items()})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(plain.lm_head.weight, weights["model.decoder.embed_tokens.weight"])
    assert same(geminifx.from_pretrained(tmp_path).state_dict(), plain)


def test_of_the_hub_nothing_is_fetched_but_a_configuration_and_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = saved(tmp_path, max_shard_size="20kB")
    ours = {file.name for file in tmp_path.iterdir()}
    others = {"consolidated.safetensors", "original/model.safetensors", "tokenizer.json", "pytorch_model.bin"}
    fetched = set[str]()

    def download(name: str, allow_patterns: list[str]) -> str:
        fetched.update(filter_repo_objects(ours | others, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    assert same(geminifx.from_pretrained("someone/some-model").state_dict(), plain)
    assert fetched == ours


@pytest.mark.parametrize("name", ["opt-mini", "config.json"])
def test_without_files_values_are_those_of_plain_pytorch(tmp_path: Path, name: str) -> None:
    if name == "config.json":
        name = str(tmp_path / name)
        Path(name).write_text(json.dumps(CONFIGS["untied"].to_dict()))
    plain = load_model(name, seed=5)
    state = torch.get_rng_state()
    for options in ({"placement": "cpu"}, {"placement": "cuda", "precision": "bf16"}):
        model = geminifx.from_pretrained(name, seed=5, **options)
        if options["placement"] == "cpu":
            model.optimizer(AdamW, moments="int8")
        assert same(model.state_dict(), plain)
    assert torch.equal(torch.get_rng_state(), state)


# -- bad files ---------------------------------------------------------------------------------------------


def test_missing_weights_are_refused_or_drawn(tmp_path: Path) -> None:
    plain = saved(tmp_path, "untied")
    weights = one_file(tmp_path)
    del weights["lm_head.weight"]
    rewrite(tmp_path, weights | {"other.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's weights: lm_head.weight .*other.weight instead"):
        geminifx.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lm_head.weight, which are initialised at random"):
        model = geminifx.from_pretrained(tmp_path, strict=False)
    found = model.state_dict()
    head = found.pop("lm_head.weight")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in found.items())
    assert head.std().item() == pytest.approx(0.02, rel=0.1)


def test_what_the_model_lacks_is_left_out_with_a_warning(tmp_path: Path) -> None:
    plain = saved(tmp_path)
    rewrite(tmp_path, one_file(tmp_path) | {"other.weight": torch.zeros(1)})
    with pytest.warns(UserWarning, match=r"1 weights in .* were not loaded.*other.weight"):
        model = geminifx.from_pretrained(tmp_path)
    assert same(model.state_dict(), plain)


def test_weights_of_another_shape_or_kind_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    name, weights = "model.decoder.layers.0.fc1.bias", one_file(tmp_path)
    for value, told in ((torch.zeros(3), "size mismatch for "), (torch.zeros(64, dtype=torch.int8), "quantised")):
        rewrite(tmp_path, weights | {name: value})
        with pytest.raises(CheckpointError, match=f"nothing was loaded: .*{told}"):
            geminifx.from_pretrained(tmp_path)


def test_tied_weights_that_differ_in_the_files_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = one_file(tmp_path)
    rewrite(tmp_path, weights | {"lm_head.weight": weights["model.decoder.embed_tokens.weight"] + 1})
    model = geminifx.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="have different values in the files, but are tied to one parameter"):
        model.state_dict()
    with pytest.raises(StateError, match="loading a checkpoint failed halfway"):
        model(input_ids=IDS)


def test_tied_weights_that_the_files_have_twice_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    """Masters are float32 in the files and bfloat16 in the chunks."""
    plain = saved(tmp_path)
    weights = one_file(tmp_path)
    rewrite(tmp_path, weights | {"lm_head.weight": weights["model.decoder.embed_tokens.weight"].clone()})
    model = geminifx.from_pretrained(tmp_path, precision="bf16")
    model.optimizer(AdamW, masters="bf16-stochastic")
    assert same(model.state_dict(), plain.bfloat16().float())


@pytest.mark.parametrize(
    ("by", "way"),
    [("state_dict", "load_pretrained"), ("optimizer", "load_pretrained"), ("call", "load_state_dict"),
     ("call", "load_checkpoint"), ("call", "initialize")],
)  # fmt: skip
def test_what_is_whole_makes_up_for_files_that_failed(tmp_path: Path, by: str, way: str) -> None:
    plain = saved(tmp_path / "good")
    saved(tmp_path / "bad")
    weights = one_file(tmp_path / "bad")
    rewrite(tmp_path / "bad", weights | {"lm_head.weight": weights["model.decoder.embed_tokens.weight"] + 1})
    model = geminifx.from_pretrained(tmp_path / "bad", example_inputs={"input_ids": IDS, "labels": IDS})
    fails = {
        "state_dict": model.state_dict,
        "call": lambda: model(input_ids=IDS),
        "optimizer": lambda: [model.plan, model.optimizer(AdamW)],
    }
    with pytest.raises(CheckpointError, match="different values"):
        fails[by]()
    with pytest.raises(StateError, match=r"load_checkpoint\(\.\.\.\), load_state_dict\(\.\.\.\) or load_pretrained\("):
        model(input_ids=IDS)
    if way == "load_pretrained":
        model.load_pretrained(tmp_path / "good")
    elif way == "load_state_dict":
        model.load_state_dict(plain.state_dict())
    elif way == "initialize":
        model.initialize(seed=5)
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS["tied"].to_dict()))
        plain = load_model(str(tmp_path / "config.json"), seed=5)
    else:
        geminifx.save_checkpoint(geminifx.from_pretrained(tmp_path / "good"), None, tmp_path / "checkpoint")
        geminifx.load_checkpoint(model, None, tmp_path / "checkpoint")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert same(model.state_dict(), plain)


def test_files_that_cannot_be_had_any_more_leave_weights_to_be_loaded(tmp_path: Path) -> None:
    """Also where a plan was made anew for an optimizer."""
    plain = saved(tmp_path / "good")
    saved(tmp_path / "gone")
    model = geminifx.from_pretrained(tmp_path / "gone", example_inputs={"input_ids": IDS, "labels": IDS})
    assert model.plan.layout.chunks
    (tmp_path / "gone" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="there are no weights"):
        model.optimizer(AdamW)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_pretrained(tmp_path / "good")
    assert same(model.state_dict(), plain)


def test_modules_that_nobody_initialises_are_told_before_anything_is_drawn() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    x, plain = torch.randn(3, 4), Scaled()
    with geminifx.init_empty():
        model = geminifx.compile(Scaled(), example_inputs=(x,))
    model.initialize()
    with pytest.raises(StateError, match=r"the model \(Scaled\) has parameters but no way to initialise them"):
        model(x)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("damage", ["cut", "header", "missing", "index"])
def test_damaged_files_are_named_before_anything_is_loaded(tmp_path: Path, damage: str) -> None:
    plain = saved(tmp_path, max_shard_size="20kB")
    model = geminifx.from_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    name = "model.safetensors.index.json" if damage == "index" else shard.name
    whole = (tmp_path / name).read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        (tmp_path / name).write_bytes(b"x" * len(whole) if damage == "header" else whole[:-100])
    with pytest.raises(CheckpointError, match=name):
        geminifx.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=name):
        model(input_ids=IDS)
    assert all(parameter.is_meta for parameter in model.parameters())
    (tmp_path / name).write_bytes(whole)
    model.load_pretrained(tmp_path)
    assert same(model.state_dict(), plain), "what is whole again is read"


@pytest.mark.parametrize("change", [Tensor.bfloat16, lambda value: value + 1], ids=["dtype", "values"])
def test_files_that_others_replace_meanwhile_are_refused(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    saved(tmp_path)
    model = geminifx.from_pretrained(tmp_path)
    others = {name: change(value) for name, value in one_file(tmp_path).items()}
    rewrite(tmp_path, others)
    with pytest.raises(CheckpointError, match=r"were replaced in the meantime; call load_pretrained\(\) again"):
        model(input_ids=IDS)
    model.load_pretrained(tmp_path)
    state = model.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in others.items())


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    CONFIGS["tied"].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"there are no weights in .*neither model.safetensors nor"):
        geminifx.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin has another format: load it with transformers"):
        geminifx.from_pretrained(tmp_path)


# -- saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "torch's"])
def test_files_of_a_given_size_and_dtype_load_with_transformers(tmp_path: Path, kind: str, ours: bool) -> None:
    plain = saved(tmp_path / "start", kind)
    model = geminifx.from_pretrained(tmp_path / "start", placement="cpu")
    if ours:
        model.optimizer(AdamW)
    model.save_pretrained(tmp_path / "out", max_shard_size="20kB", dtype=torch.bfloat16)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 22_000 for shard in shards)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert next(loaded.parameters()).dtype == torch.bfloat16 and same(loaded.state_dict(), plain.bfloat16())
    with pytest.raises(ValueError, match=r"dtype=torch.int8; expected a floating-point dtype"):
        model.save_pretrained(tmp_path / "out", dtype=torch.int8)
    with pytest.raises(ValueError, match=r"max_shard_size: .*much"):
        model.save_pretrained(tmp_path / "out", max_shard_size="much")


# -- memory ------------------------------------------------------------------------------------------------

MEASURED = """
import sys
from collections.abc import Callable
from pathlib import Path
import geminifx, torch
from geminifx.models.presets import Shape

def peak_bytes():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l).split()[1]) * 1024

def restart():
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()

def placed(model):
    model.optimizer(torch.optim.SGD, lr=0.1, in_backward=True)
    before = restart()
    model.session.placed()
    return model.plan.estimate.host_bytes, peak_bytes() - before

placed(geminifx.from_pretrained("opt-mini"))  # what the first of all loads besides
folder = Path(sys.argv[1])
Shape(layers=6, hidden=512, heads=8, vocab_size=4096, positions=64).config().to_json_file(folder / "c.json")
options = {"placement": "cpu", "precision": "fp32"}
model = geminifx.from_pretrained(str(folder / "c.json"), "1GB", **options)
print("drawn", *placed(model))
before = restart()
model.save_pretrained(folder / "out", max_shard_size="8MB")
print("saved", 0, peak_bytes() - before)
del model
print("read", *placed(geminifx.from_pretrained(str(folder / "out"), "1GB", **options)))
"""


@pytest.mark.slow
def test_the_host_holds_what_is_planned_and_one_file(tmp_path: Path) -> None:
    """21 million parameters of 4 bytes: a second copy would be 84 MB."""
    gives_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed, or it would count as held
    words = [sys.executable, "-c", MEASURED, str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=gives_back)
    assert not ended.returncode, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    for name, planned, peak in [(name, int(planned), int(peak)) for name, planned, peak in rows]:
        assert peak < planned + 50e6, (name, planned, peak)
    assert int(rows[0][1]) > 80e6
