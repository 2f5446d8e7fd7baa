"""Models by name."""

import json
from pathlib import Path

import pytest
import torch
from geminifx.models.presets import PRESETS, ModelLoadError, brings_tokenizer, empty_model, load_model
from transformers import AutoModelForCausalLM, OPTForCausalLM

# What the published checkpoints hold, in millions of parameters.
PUBLISHED = {
    "opt-125m": 125.2,
    "opt-350m": 331.2,
    "opt-1.3b": 1315.8,
    "opt-2.7b": 2651.6,
    "opt-6.7b": 6658.5,
    "opt-13b": 12853.5,
    "opt-30b": 29974.5,
    "opt-66b": 65719.7,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = OPTForCausalLM(PRESETS[name].config())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.06)


def test_the_small_preset_repeats_and_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (
        load_model("opt-mini", seed=3),
        load_model("opt-mini", seed=3),
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = load_model("opt-mini", seed=4)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_loads_a_directory_as_float32(tmp_path: Path) -> None:
    model = load_model("opt-mini").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.training
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.float(), b)


def test_loads_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "tiny.json"
    fields = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 100}
    file.write_text(json.dumps({"model_type": "gpt2", **fields}))
    assert load_model(str(file)).get_input_embeddings().weight.shape == (100, 32)


def test_trained_weights_need_their_own_tokenizer() -> None:
    assert not brings_tokenizer("opt-1.3b") and not brings_tokenizer("configs/tiny.json")
    assert brings_tokenizer("runs/opt-mini") and brings_tokenizer("facebook/opt-125m")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot read the config file"),
        ("{}", "has no 'model_type'"),
        ("[]", "has no 'model_type'"),
        ('{"model_type": "no-such-model"}', "could not build a causal language model"),
        ('{"model_type": "vit"}', "could not build a causal language model"),
    ],
)
def test_says_what_is_wrong_with_a_config_file(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ModelLoadError, match=says):
        load_model(str(tmp_path / "c.json"))


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nothing at \./runs/none; expected a preset \(opt-mini"):
        load_model("./runs/none")
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ModelLoadError, match="no config file"):
        load_model(str(tmp_path / "none.json"))


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    PRESETS["opt-mini"].config().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="cannot load the model in"):
        load_model(str(tmp_path))


def test_a_checkpoint_that_lacks_a_weight_or_holds_junk(tmp_path: Path) -> None:
    model = load_model("opt-mini")
    weights = model.state_dict()
    del weights["model.decoder.layers.0.fc1.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelLoadError, match=r"lacks model\.decoder\.layers\.0\.fc1\.weight, the first of 1 missing"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(ModelLoadError, match="could not build a causal language model from"):
        load_model(str(tmp_path))
    assert empty_model(str(tmp_path)).model.decoder.layers[0].fc1.weight.is_meta


def test_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore lines")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offline)
    with pytest.raises(
        ModelLoadError,
        match=r"it could not be loaded from the Hugging Face Hub \(We couldn't connect .*\)\. Without a connection",
    ):
        load_model("someone/some-model")
