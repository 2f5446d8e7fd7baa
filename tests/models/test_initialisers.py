"""Random weights are those of the constructor under the same seed, drawn without ever having all of them."""

from collections.abc import Callable

import geminifx
import pytest
import torch
from geminifx.compiler.capture.materialize import give_buffers
from geminifx.models.adapters import blocks
from geminifx.models.initialisers import initialise
from geminifx.runtime.isa.errors import StateError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
GATED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}


def language_model(config: PreTrainedConfig) -> Callable[[], nn.Module]:
    return lambda: AutoModelForCausalLM.from_config(config)


LIKE_PLAIN: dict[str, Callable[[], nn.Module]] = {
    "OPT": language_model(OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=32)),
    "Llama": language_model(LlamaConfig(**GATED)),
    "Qwen3 MoE": language_model(Qwen3MoeConfig(**GATED, moe_intermediate_size=16, num_experts=4, head_dim=16)),
    "Mamba": language_model(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99)),
    "T5": lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, vocab_size=99)),
    "BERT": lambda: BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=64)),
    "plain modules": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.LSTM(4, 4)),
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, 32),
}


def drawn(build: Callable[[], nn.Module], seed: int = 3) -> dict[str, Tensor]:
    with geminifx.init_empty():
        model = build()
    give_buffers(model)
    found: dict[str, Tensor] = {}
    empty = dict(model.named_parameters())

    def give(name: str, values: Tensor) -> None:
        assert name not in found
        found[name] = values.clone()

    initialise(model, empty, blocks(model), seed, give)
    assert dict(model.named_parameters()) == empty, "parameters are as they were"
    return found


@pytest.mark.parametrize("name", LIKE_PLAIN)
def test_values_are_those_of_the_constructor(name: str) -> None:
    torch.manual_seed(3)
    plain = LIKE_PLAIN[name]()
    before = torch.get_rng_state()
    found = drawn(LIKE_PLAIN[name])
    assert torch.equal(torch.get_rng_state(), before)
    assert found.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(found[name], value) for name, value in plain.named_parameters())


def test_where_a_constructor_draws_by_itself_weights_have_its_distribution() -> None:
    build = language_model(GPT2Config(n_embd=32, n_layer=8, n_head=2, vocab_size=999))
    found = drawn(build)
    for name, value in build().named_parameters():
        assert found[name].std().item() == pytest.approx(value.std().item(), rel=0.1), name


def test_what_nobody_initialises_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    with pytest.raises(StateError, match=r"1 \(Scale\) has parameters but no way to initialise them"):
        drawn(lambda: nn.Sequential(nn.Linear(3, 3), Scale()))
