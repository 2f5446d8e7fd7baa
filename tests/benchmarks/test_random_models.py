"""Models by name: the published sizes, the same values whichever way they are made."""

import json

import pytest
import random_models
import torch
from random_models import (
    BLOCK,
    SHAPES,
    config_of,
    empty_model,
    fill,
    full_name,
    names,
    overlapping,
    random_model,
    reads_images,
)
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

MILLIONS = {  # as published
    "opt-1.3b": 1315.8, "opt-66b": 65719.7, "opt-175b": 174604.5, "llama-1b": 1235.8, "llama-3b": 3212.7,
    "llama-8b": 8030.3, "gpt2-xl": 1557.6, "qwen2.5-1.5b": 1543.7, "gemma-2-2b": 2614.3, "mistral-7b": 7241.7,
    "vit-l": 304.3,
}  # fmt: skip

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "vocab_size": 96, "max_position_embeddings": 64, "image_size": 32, "num_labels": 5,
}  # fmt: skip


def tiny(name):
    """The model's configuration, small in every size that it has."""
    config = config_of(name)
    for field, value in TINY.items():
        if getattr(config, field, None) is not None:
            setattr(config, field, value)
    return config


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_models_have_the_published_number_of_parameters(name, millions):
    count = sum(parameter.numel() for parameter in empty_model(config_of(name)).parameters())
    assert round(count / 1e6, 1) == millions


def test_names_in_short_and_what_is_no_name(tmp_path):
    assert full_name("1.3b") == full_name("opt-1.3b") == "opt-1.3b"
    assert full_name("mini") == "opt-mini" and full_name("llama-mini") == "llama-mini"
    with pytest.raises(ValueError, match=r"no model 'llama-2b'; expected one of .*llama-3b"):
        full_name("llama-2b")
    with pytest.raises(ValueError, match="no model"):
        full_name(str(tmp_path / "config.json"))


def test_a_config_file_is_a_model(tmp_path):
    tiny("llama-1b").save_pretrained(tmp_path)
    name = full_name(str(tmp_path / "config.json"))
    model = random_model(config_of(name), torch.device("cpu"), torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.hidden_size == 32
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("name", ["opt-1.3b", *SHAPES])
def test_weights_are_random_and_buffers_those_of_the_model(name):
    """Built on `meta` and filled, a model computes with the buffers that it has when built with memory."""
    config = tiny(name)
    kind = AutoModelForImageClassification if reads_images(config) else AutoModelForCausalLM
    made, usual = random_model(config, torch.device("cpu"), torch.bfloat16), kind.from_config(config)
    buffers = dict(usual.named_buffers())
    assert dict(made.named_buffers()).keys() == buffers.keys()
    for key, buffer in made.named_buffers():
        assert buffer.dtype == buffers[key].dtype and torch.equal(buffer, buffers[key]), key
    assert [key for key, _ in made.named_parameters()] == [key for key, _ in usual.named_parameters()]  # tied alike
    for key, parameter in made.named_parameters():
        usual_weight = dict(usual.named_parameters())[key]
        assert parameter.dtype == torch.bfloat16 and parameter.shape == usual_weight.shape
        if parameter.dim() == 1:  # biases and norms, which their models begin with, too
            assert torch.equal(parameter.float(), usual_weight.float()) or "token" in key, key
        else:
            assert 0.01 < parameter.float().std() < 0.03, key


def test_the_values_depend_on_the_name_alone():
    a, b, other = torch.empty(64, 8), torch.empty(64, 8, dtype=torch.bfloat16), torch.empty(64, 8)
    for name, weight in (("layer.weight", a), ("layer.weight", b), ("layer2.weight", other)):
        fill(name, weight)
    assert torch.equal(a, b.float()) and not torch.equal(a, other)
    second = torch.empty(24, 8)
    fill("layer.weight", second, first=40 * 8)
    assert torch.equal(second, a[40:])


def test_views_of_the_block_are_values_that_depend_on_the_name() -> None:
    block = random_models._block(torch.device("cpu"))
    for rows, columns in ((256_000, 2304), (128_256, 8192), (8192, 28_672), (64, 8)):
        shape = torch.Size((rows, columns))
        one, same, other = (overlapping(name, shape) for name in ("a.weight", "a.weight", "b.weight"))
        assert one.shape == shape and one.dtype == torch.bfloat16
        assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() == block.data_ptr()
        assert block.untyped_storage().nbytes() == 2 * BLOCK
        assert max(view.storage_offset() + (rows - 1) * view.stride(0) + columns for view in (one, other)) <= BLOCK
        assert torch.equal(one[-1], same[-1]) and not torch.equal(one[0], other[0])
        assert not torch.equal(one[0], one[1]) and not torch.equal(one[-2], one[-1])
        starts = [overlapping(f"{number}.weight", shape).storage_offset() for number in range(20)]
        assert max(starts) - min(starts) > BLOCK // 4
    vector, filled = overlapping("a.weight", torch.Size((9,))), torch.empty(9, dtype=torch.bfloat16)
    fill("a.weight", filled)
    assert torch.equal(vector, filled)


def test_dropout_is_of_the_kinds_that_the_model_trains_with():
    assert all("drop" not in field or not value for name in names() for field, value in vars(config_of(name)).items())
    opt, gpt2, llama = (config_of(name, dropout=0.2) for name in ("opt-1.3b", "gpt2-xl", "llama-1b"))
    assert (opt.dropout, opt.attention_dropout, opt.layerdrop) == (0.2, 0.0, 0.0)
    assert (gpt2.resid_pdrop, gpt2.embd_pdrop, gpt2.attn_pdrop) == (0.2, 0.2, 0.2)
    assert llama.attention_dropout == 0.2


def test_a_model_has_positions_for_its_sequences():
    assert config_of("opt-1.3b", seq=1024).max_position_embeddings == 2048
    assert config_of("opt-1.3b", seq=32_768).max_position_embeddings == 32_768
