"""Models by name with random weights, made in seconds without a network, the same for every system that is compared.

A name is one of `names()`, such as "llama-3b" or "opt-1.3b" ("1.3b" for short), or the path of a Hugging Face
`config.json`. Names of the published models mean their published shapes.
"""

from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import geminifx
import torch
from geminifx.models.presets import PRESETS, Shape
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    ViTConfig,
)

BLOCK = 4_194_301
"""Random values drawn in all. A prime, so that no two rows of a weight, which repeats them, are equal."""

STD = 0.02

OPT_SHAPES = {**PRESETS, "opt-175b": Shape(layers=96, hidden=12288, heads=96)}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    """Return the sizes of a Llama-like model under their names in configurations."""
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate,
    }  # fmt: skip


def _llama3(factor: float) -> dict[str, Any]:
    """Return what all models of Llama 3.1 and 3.2 have alike, but for the factor that stretches their positions."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return {
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
    }


SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama-mini": (LlamaConfig, {**_sizes(256, 4, 4, 2, 512), "vocab_size": 2048, "tie_word_embeddings": True}),
    "llama-1b": (LlamaConfig, {**_sizes(2048, 16, 32, 8, 8192), **_llama3(32.0), "tie_word_embeddings": True}),
    "llama-3b": (LlamaConfig, {**_sizes(3072, 28, 24, 8, 8192), **_llama3(32.0), "tie_word_embeddings": True}),
    "llama-8b": (LlamaConfig, {**_sizes(4096, 32, 32, 8, 14336), **_llama3(8.0), "tie_word_embeddings": False}),
    "llama-70b": (LlamaConfig, {**_sizes(8192, 80, 64, 8, 28672), **_llama3(8.0), "tie_word_embeddings": False}),
    "gpt2-xl": (GPT2Config, {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50_257}),
    "qwen2.5-1.5b": (Qwen2Config, {
        **_sizes(1536, 28, 12, 2, 8960), "vocab_size": 151_936, "max_position_embeddings": 131_072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
    }),
    "gemma-2-2b": (Gemma2Config, {
        **_sizes(2304, 26, 8, 4, 9216), "vocab_size": 256_000, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }),
    "mistral-7b": (MistralConfig, {  # v0.1, whose attention has a window
        **_sizes(4096, 32, 32, 8, 14336), "vocab_size": 32_000, "sliding_window": 4096,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5,
    }),
    "vit-l": (ViTConfig, {  # ViT-L/16 on the 1,000 classes of ImageNet
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "image_size": 224, "patch_size": 16, "num_labels": 1000, "architectures": ["ViTForImageClassification"],
    }),
}  # fmt: skip
"""Published shapes beside OPT's, from the models' own configurations, and a tiny one to try things with."""


def names() -> tuple[str, ...]:
    return (*OPT_SHAPES, *SHAPES)


def full_name(text: str) -> str:
    """Return "opt-1.3b" for "1.3b" and "opt-1.3b"; the path of a config file as it is.

    Raises ValueError where there is neither a model nor a config file of that name.
    """
    found = next((name for name in (text, f"opt-{text}") if name in names()), None)
    if found is None and not (text.endswith(".json") and Path(text).is_file()):
        raise ValueError(
            f"there is no model {text!r}; expected one of {', '.join(names())}, or the path of a config.json"
        )
    return found or text


def config_of(name: str, dropout: float = 0.0, seq: int = 0) -> PreTrainedConfig:
    """Return the configuration of a model with positions for `seq` tokens, without a cache and without layer-drop.

    `dropout` becomes the probability of those dropouts that are not 0 by default in the configuration's class
    (OPT's hidden ones, GPT-2's of every kind), or of all that it has where all are 0 (Llama's attention, ViT's of
    both kinds); the others are 0.
    """
    if name in OPT_SHAPES:
        config: PreTrainedConfig = OPT_SHAPES[name].config()
    elif name in SHAPES:
        kind, fields = SHAPES[name]
        config = kind(**fields)
    else:
        config = AutoConfig.from_pretrained(name)
    kinds = [field for field in vars(config) if "dropout" in field or field.endswith("_pdrop")]
    default = type(config)()
    usual = [field for field in kinds if getattr(default, field, None)]
    for field in kinds:
        setattr(config, field, dropout if field in (usual or kinds) else 0.0)
    for field in [field for field in vars(config) if "layerdrop" in field]:
        setattr(config, field, 0.0)
    if getattr(config, "max_position_embeddings", None):
        config.max_position_embeddings = max(config.max_position_embeddings, seq)
    config.use_cache = False
    return config


def reads_images(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForImageClassification") for name in config.architectures or ())


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model in training mode, float32, its weights on `meta`, its buffers on the CPU with their values."""
    kind = AutoModelForImageClassification if reads_images(config) else AutoModelForCausalLM
    with geminifx.init_empty():
        model = kind.from_config(config, dtype=torch.float32).train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for module in model.modules():
            buffers = [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for key in buffers:  # rotary frequencies, causal masks, which Hugging Face computes when it loads weights
                setattr(module, key, torch.zeros_like(getattr(module, key), device="cpu"))
            if buffers:
                model._init_weights(module)
    return model


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model in training mode with random weights in `dtype` on `device`; its buffers keep their dtype."""
    model = empty_model(config)
    for parameter in model.parameters():  # swapped and not replaced, so that tied ones stay tied
        memory = torch.empty_like(parameter, device=device, dtype=dtype)
        torch.utils.swap_tensors(parameter, nn.Parameter(memory, parameter.requires_grad))
    for key, parameter in model.named_parameters():
        fill(key, parameter.detach(), norm_weight(config))
    return model.to(device)


def cap_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, with Hugging Face's eager attention where its scores have a soft cap.

    torch's fused attention, its default, leaves the cap out without a word.
    """
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def norm_weight(config: PreTrainedConfig) -> float:
    """Return the weight of a norm that scales by 1: Gemma's multiply by 1 + weight."""
    return 0.0 if config.model_type.startswith("gemma") else 1.0


def fill(name: str, weight: Tensor, norm: float = 1.0, first: int = 0) -> None:
    """Give a contiguous tensor of any shape its values: N(0, 0.02), biases 0, norms' weights `norm`.

    Of a weight in parts, the tensor is the one that begins with element number `first`.
    The values depend on the name alone and are exact in bfloat16: every system starts from the same ones,
    whether it keeps float32 or not. (The first steps therefore change little: what computes is the weight rounded
    back to bfloat16.) They repeat one small block, since drawing billions would take minutes.
    """
    if name.endswith("bias"):
        weight.zero_()
    elif "norm" in name or ".ln_" in name:
        weight.fill_(norm)
    else:
        block, flat = _block(weight.device), weight.view(-1)
        done, start = 0, (crc32(name.encode()) + first) % BLOCK
        while done < flat.numel():
            length = min(BLOCK - start, flat.numel() - done)
            flat.narrow(0, done, length).copy_(block.narrow(0, start, length))
            done, start = done + length, 0


def overlapping(name: str, shape: torch.Size, norm: float = 1.0) -> Tensor:
    """Return random values for a weight, bfloat16; a matrix's take no memory of their own, others' are `fill`'s.

    The rows of a matrix are parts of the block, which overlap where the matrix is large, and begin at a place that
    depends on the name. So more weights than the host holds can be loaded.
    """
    if len(shape) != 2:
        values = torch.empty(shape, dtype=torch.bfloat16)
        fill(name, values, norm)
        return values
    rows, columns = shape
    stride = (BLOCK - columns) // (2 * rows)  # half of the block is left to begin in
    slack = BLOCK - columns - stride * (rows - 1)
    return _block(torch.device("cpu")).as_strided((rows, columns), (stride, 1), crc32(name.encode()) % (slack + 1))


@cache
def _block(device: torch.device) -> Tensor:
    """Return the random values on `device`, bfloat16 [BLOCK]."""
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    return values.mul_(STD).bfloat16().to(device)
