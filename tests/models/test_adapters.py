"""Preparing models for capture and undoing it, example inputs, and where the blocks are."""

import copy

import pytest
import torch
import transformers
from geminifx.models.adapters import blocks, capturable, example_inputs
from geminifx.models.attention import NAME
from geminifx.runtime.isa.errors import CaptureError
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}


def opt(**changes):
    options = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32, **changes}
    return OPTForCausalLM(OPTConfig(**options)).train()


def bart(**changes):
    options = {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 32,
    }
    return BartForConditionalGeneration(BartConfig(**{**options, **changes})).train()


def roberta(kind):
    config = RobertaConfig(**SMALL, intermediate_size=64, max_position_embeddings=34, num_labels=3)
    return kind(config).train()


def vit():
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config).train()


def test_configuration_and_torch_are_restored_also_after_an_error():
    model = bart()
    before, functions = (
        copy.deepcopy(vars(model.config)),
        (torch.rand, nn.functional.scaled_dot_product_attention),
    )
    with capturable(model, IDS):
        assert model.config._attn_implementation == NAME and not model.config.use_cache
        assert torch.rand is not functions[0]
    assert vars(model.config) == before
    with pytest.raises(RuntimeError, match="in the middle"), capturable(model, IDS):
        model.config.something = 1
        raise RuntimeError("in the middle")
    assert vars(model.config) == before
    assert (torch.rand, nn.functional.scaled_dot_product_attention) == functions


def test_eager_is_respected_and_models_without_an_interface_are_noted():
    model = opt(attn_implementation="eager")
    with capturable(model, IDS) as notes:
        assert model.config._attn_implementation == "eager"
    assert any("as configured" in note for note in notes)
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with capturable(model, IDS) as notes:
        assert model.config._attn_implementation != NAME
    assert any("no attention interface" in note for note in notes)


def test_gradient_checkpointing_is_left_to_the_plan():
    model = opt()
    model.gradient_checkpointing_enable()
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    with pytest.warns(UserWarning, match=r"compiled steps ignore it: compile\(recompute=\)"), capturable(model, IDS):
        assert on and not any(module.gradient_checkpointing for module in on)
    assert all(module.gradient_checkpointing for module in on)


def test_experts_are_batched():
    config = MixtralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, num_local_experts=4)
    model = MixtralForCausalLM(config)
    before = model.config._experts_implementation
    with capturable(model, IDS):
        assert model.config._experts_implementation == "batched_mm"
    assert model.config._experts_implementation == before


def test_layerdrop_is_refused_in_training_mode_only():
    model = opt(layerdrop=0.1)
    with pytest.raises(CaptureError, match=r"model\.decoder\.layerdrop is 0\.1"), capturable(model, IDS):
        pass
    with capturable(model.eval(), IDS):
        pass
    with (
        pytest.raises(CaptureError, match=r"encoder\.layerdrop"),
        capturable(bart(encoder_layerdrop=0.2), IDS),
    ):
        pass


def test_zero_layerdrop_is_a_constant_for_its_owner_alone():
    class Dropping(nn.Module):
        layerdrop = 0.0

        def __init__(self):
            super().__init__()
            self.layerdrop = 0.0

        def forward(self):
            return torch.rand([]), torch.rand([2])

    class Drawing(nn.Module):
        def forward(self):
            return torch.rand([])

    dropping, drawing = Dropping(), Drawing()
    with capturable(nn.ModuleList([dropping, drawing]), {}):
        scalar, vector = dropping()
        assert scalar == 1.0 and isinstance(scalar, float) and vector.shape == (2,)
        assert isinstance(drawing(), torch.Tensor)
    assert isinstance(dropping()[0], torch.Tensor)


def test_other_modules_work_and_their_attention_is_routed():
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = module(x, x, x, need_weights=False)[0]
    with capturable(module, {"query": x}) as notes:
        out = module(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(out, expected)
    assert notes == []


@pytest.mark.parametrize(
    "make, shapes",
    [
        (opt, {"input_ids": (2, 32), "labels": (2, 32)}),
        (bart, {"input_ids": (2, 32), "labels": (2, 32)}),
        (lambda: roberta(RobertaForSequenceClassification), {"input_ids": (2, 32), "labels": (2,)}),
        (lambda: roberta(RobertaForTokenClassification), {"input_ids": (2, 32), "labels": (2, 32)}),
        (vit, {"pixel_values": (2, 3, 32, 32), "labels": (2,)}),
    ],
)
def test_example_inputs_train_the_model(make, shapes):
    model = make()
    inputs = example_inputs(model, batch_size=2)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == shapes
    again = example_inputs(model, batch_size=2)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite()


def test_example_inputs_know_their_limits():
    assert example_inputs(nn.Linear(2, 2)) is None
    assert example_inputs(transformers.OPTModel(opt().config)) is None
    vision = {**SMALL, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config={**SMALL, "intermediate_size": 48})
    assert example_inputs(transformers.CLIPForImageClassification(config)) is None, "sizes are its vision part's"
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48)
    assert example_inputs(transformers.XLNetLMHeadModel(config))["input_ids"].shape == (1, 512), "of any length"
    assert example_inputs(opt(), 1, 8)["input_ids"].shape == (1, 8)
    with pytest.raises(ValueError, match="exceeds the 32 positions"):
        example_inputs(opt(), 1, 33)
    with pytest.raises(ValueError, match="positive"):
        example_inputs(opt(), 0)


def test_blocks_are_the_outermost_repeated_modules_in_order():
    assert blocks(opt()) == ("model.decoder.layers.0", "model.decoder.layers.1")
    assert blocks(bart()) == tuple(f"model.{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1))
    assert blocks(nn.Linear(2, 2)) == ()
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert blocks(nn.Sequential(inner, nn.ReLU(), nn.Linear(2, 2))) == ("0", "2")
    # A list with one block says nothing is repeated there; its inside may be.
    assert blocks(nn.ModuleList([inner])) == ("0.0", "0.1")
    assert blocks(nn.ModuleList([nn.ReLU(), nn.ReLU()])) == ()
