"""Models of published sizes, weights on `meta`, and what their blocks take: for plans of worlds."""

from functools import cache

import geminifx
import torch
from geminifx.compiler.capture.trace import CaptureRequest
from geminifx.compiler.planner.world.model import Model
from geminifx.compiler.planner.world.ways import Space
from geminifx.compiler.planner.world.world import World
from geminifx.compiler.rates.clusters import Cluster
from geminifx.compiler.rates.rates import ARENA
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

EXAMPLES, LENGTH = 2, 1024


def _opt(layers: int, hidden: int, heads: int) -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_dim=4 * hidden,
            word_embed_proj_dim=hidden, vocab_size=50272, max_position_embeddings=2048, layerdrop=0.0,
        )
    )  # fmt: skip


MODELS = {
    "gpt2-xl": lambda: GPT2LMHeadModel(GPT2Config(n_layer=48, n_embd=1600, n_head=25)),
    "opt-6.7b": lambda: _opt(32, 4096, 32),
    "llama-8b": lambda: LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
            intermediate_size=14336, vocab_size=128256,
        )
    ),
    "t5-3b": lambda: T5ForConditionalGeneration(
        T5Config(
            num_layers=24, d_model=1024, d_ff=16384, num_heads=32, d_kv=128, vocab_size=32128, decoder_start_token_id=0
        )
    ),
    "opt-30b": lambda: _opt(48, 7168, 56),
    "opt-175b": lambda: _opt(96, 12288, 96),
}  # fmt: skip


@cache
def measured(name: str) -> Model:
    """What a model's blocks take in bfloat16."""
    with geminifx.init_empty():
        model = MODELS[name]().train()
    tokens = torch.empty((EXAMPLES, LENGTH), dtype=torch.int64, device="meta")
    return Model.of(model, ((), {"input_ids": tokens, "labels": tokens}), CaptureRequest(torch.bfloat16))


def world_of(cluster: Cluster, device_bytes: int | None, per_device: int = EXAMPLES) -> World:
    """A cluster of which so many bytes of each device, and nine tenths of its hosts, may be taken."""
    host_bytes = None if cluster.host_bytes is None else int(0.9 * cluster.host_bytes) // cluster.devices
    return World(cluster, cluster.rates or ARENA, per_device * cluster.size, device_bytes, host_bytes)


def space_of(model: Model, world: World) -> Space:
    """All ways, whether the product runs them or not."""
    return Space(world.cluster.size, world.examples, len(model.parts), model.heads, refusal=lambda way: "")
