"""OPT of any preset with random weights, made in seconds, the same for every system that is compared."""

from dataclasses import replace
from functools import cache
from zlib import crc32

import geminifx
import torch
from geminifx.models.presets import PRESETS
from torch import Tensor
from transformers import OPTForCausalLM

BLOCK = 4_194_301
"""Random values drawn in all. A prime, so that no two rows of a weight, which repeats them, are equal."""

STD = 0.02


def preset(size: str) -> str:
    """Return the preset's name for "1.3b" or "opt-1.3b". Raises ValueError where there is none."""
    for name in (size, f"opt-{size}"):
        if name in PRESETS:
            return name
    raise ValueError(f"there is no model {size!r}; expected one of {', '.join(PRESETS)}")


def empty_model(size: str) -> OPTForCausalLM:
    """Return the model in training mode, dropout 0, float32, its weights on `meta`."""
    with geminifx.init_empty():
        model = OPTForCausalLM(replace(PRESETS[preset(size)], dropout=0.0).config()).train()
    model.config.use_cache = False
    return model


def random_model(size: str, device: torch.device, dtype: torch.dtype) -> OPTForCausalLM:
    """Return the model in training mode, dropout 0, with random weights in `dtype` on `device`."""
    model = empty_model(size).to(dtype).to_empty(device=device)
    model.tie_weights()  # to_empty gave each use of a shared weight memory of its own
    for name, parameter in model.named_parameters():
        fill(name, parameter.detach())
    return model


def fill(name: str, weight: Tensor) -> None:
    """Give a contiguous tensor of any shape its values: N(0, 0.02), biases 0, norms' weights 1.

    The values depend on the name alone and are exact in bfloat16: every system starts from the same ones,
    whether it keeps float32 or not. (The first steps therefore change little: what computes is the weight rounded
    back to bfloat16.) They repeat one small block, since drawing billions would take minutes.
    """
    if name.endswith("bias"):
        weight.zero_()
    elif "norm" in name:
        weight.fill_(1)
    else:
        block, flat = _block(weight.device), weight.view(-1)
        done, start = 0, crc32(name.encode()) % BLOCK
        while done < flat.numel():
            length = min(BLOCK - start, flat.numel() - done)
            flat.narrow(0, done, length).copy_(block.narrow(0, start, length))
            done, start = done + length, 0


@cache
def _block(device: torch.device) -> Tensor:
    """Return the random values on `device`, bfloat16 [BLOCK]."""
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    return values.mul_(STD).bfloat16().to(device)


def random_batch(size: str, batch: int, seq: int, device: torch.device) -> dict[str, Tensor]:
    """Return the model's keyword arguments: int64 tokens [batch, seq] as inputs and, unshifted, as labels."""
    vocab_size = PRESETS[preset(size)].vocab_size
    tokens = torch.randint(0, vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": tokens, "labels": tokens}
