"""Tiny models of other families than those of `zoo`: what sharding has to find its way through."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from zoo import VOCAB, Batch, Case, opt, tokens

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "vocab_size": VOCAB, "intermediate_size": 48, "max_position_embeddings": 32}


def llama_of_four() -> nn.Module:
    """As many key and value heads as query heads, so that four ranks can share them."""
    return LlamaForCausalLM(LlamaConfig(**DECODER, num_key_value_heads=4)).train()


def mistral() -> nn.Module:
    """Each token sees a window of four."""
    return MistralForCausalLM(MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=4)).train()


def qwen3() -> nn.Module:
    """Queries and keys are normalized, head by head."""
    return Qwen3ForCausalLM(Qwen3Config(**DECODER, num_key_value_heads=2, head_dim=8)).train()


def bert(dropout: float = 0.0) -> nn.Module:
    """Sees both ways; a transform and a bias stand before the loss, and the head is tied."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"vocab_size": VOCAB, "intermediate_size": 64, "max_position_embeddings": 32}
    return BertForMaskedLM(BertConfig(**SIZES, **sizes, **rates)).train()


def encoder_decoder() -> nn.Module:
    """BERT twice, each with a configuration of its own, which the model exchanges for copies. Its weights are large, so
    that what is seen and what is masked makes a difference; the same ones each time."""
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.5}
    first, second = (
        BertConfig(**DECODER, **rates, is_decoder=decodes, add_cross_attention=decodes) for decodes in (False, True)
    )
    model = EncoderDecoderModel(encoder=BertModel(first), decoder=BertLMHeadModel(second))
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model.train()


def t5() -> nn.Module:
    """An encoder and a decoder; a table of relative positions is added to the attention's scores."""
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, dropout_rate=0.0)).train()


def vit() -> nn.Module:
    """Patches of images; one token is read at the end."""
    sizes = {"intermediate_size": 64, "image_size": 16, "patch_size": 8, "num_labels": 4}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**SIZES, **sizes, **rates)).train()


class Detached(nn.Module):
    """A loss beside logits without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.model = opt()

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.model(input_ids=ids, labels=ids)
        return found.loss, found.logits.detach()


def pictures(batch: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator), "labels": torch.arange(batch) % 4}


LLAMA_OF_FOUR = Case("llama of four", llama_of_four, exact=False)
MISTRAL, QWEN3 = Case("mistral", mistral, exact=False), Case("qwen3", qwen3, exact=False)
BERT, T5, VIT = Case("bert", bert), Case("t5", t5), Case("vit", vit, pictures)
DETACHED = Case("opt, its logits detached", Detached, lambda **sizes: {"ids": tokens(**sizes)["input_ids"]})
MORE = (MISTRAL, QWEN3, BERT, T5, VIT)
