"""Tiny models with their batches and losses, and training loops that run on a plain and a compiled model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa.errors import BudgetError
from shared_captures import shared_captures
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

VOCAB = 64
Batch = dict[str, Tensor]


def opt(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    config = {"vocab_size": VOCAB, "num_attention_heads": 4, "max_position_embeddings": 32, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**{**sizes, **config, **changes})).train()


def gpt2(dropout: float = 0.0, layers: int = 2) -> nn.Module:
    """Its head is tied to its embedding."""
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": 0.0}
    sizes = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **rates)).train()


def llama(key_heads: int = 2, layers: int = 2) -> nn.Module:
    """Grouped key and value heads, rotary positions, RMS norm."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": key_heads}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **heads)).train()


def cnn() -> nn.Module:
    stage = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())  # noqa: E731
    # The head is where most parameters are, as in many networks of its time.
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 5))
    return nn.Sequential(nn.Sequential(stage(3, 4), stage(4, 8)), *head)


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48), nn.GELU()) for _ in range(4)), nn.Linear(48, 3)
    )


class Blocks(nn.Module):
    """A bit of everything that training loops run into: a tied head, dropout in the blocks and on top, a
    parameter that nothing reads, and blocks of equal shape."""

    def __init__(self, dropout: float = 0.0, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(_block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(7))
        self.dropout = dropout

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.dropout(x, self.dropout, self.training))


def _block(width: int, dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout))


def tokens(batch: int = 2, length: int = 8, seed: int = 0) -> Batch:
    ids = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def images(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"input": torch.randn(2, 3, 4, 4, generator=generator), "target": torch.arange(2)}


def vectors(batch: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"input": torch.randn(batch, 48, generator=generator), "target": torch.arange(batch) % 3}


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["input"]), batch["target"])


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


@dataclass(frozen=True)
class Case:
    """A model and how it is trained. `exact`: every bit is plain PyTorch's."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[..., Batch] = tokens
    loss: Callable[[nn.Module, Batch], Tensor] = own_loss
    exact: bool = True

    def seeded(self) -> nn.Module:
        """The model, always with the same weights."""
        torch.manual_seed(0)
        return self.build()

    def examples(self) -> dict[str, Any]:
        """What `compile` needs besides the model in order to plan at once."""
        batch = self.batch()
        return {"example_inputs": batch if self.loss is own_loss else (next(iter(batch.values())),)}


OPT, GPT2 = Case("opt", opt), Case("gpt2, tied", gpt2)
# torch's attention repeats the grouped heads, ours does not: sums are taken in another order.
LLAMA = Case("llama", llama, exact=False)
CNN = Case("cnn with batch norm", cnn, images, cross_entropy)
MLP = Case("mlp, loss outside", mlp, vectors, cross_entropy)
BLOCKS = Case("blocks", Blocks, tokens, next_token)
CASES = (OPT, GPT2, LLAMA, CNN, MLP)


def compiled(case: Case, **options: Any) -> geminifx.CompiledModule:
    with shared_captures():
        return geminifx.compile(case.seeded(), **{**case.examples(), **options})


@cache
def smallest_budget(case: Case, **options: Any) -> int:
    """The smallest budget that compile names, under "auto" unless another placement is given."""
    with pytest.raises(BudgetError) as refused:
        compiled(case, **options, device_budget=1)
    assert refused.value.smallest_bytes is not None
    return refused.value.smallest_bytes


def state_bytes(model: nn.Module) -> int:
    """Weights, gradients and AdamW's two moments in float32."""
    return 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass
class Trace:
    """What a training run shows: losses, and after every backward all gradients by name."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)

    def record(self, model: nn.Module, loss: Tensor) -> None:
        self.losses.append(loss.detach().clone())
        named = model.named_parameters()
        self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in named})


Optimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


def train(case: Case, model: nn.Module, optimizer: str = "adamw", steps: int = 5) -> Trace:
    """The plainest loop there is."""
    torch.manual_seed(1)
    trace, optim = Trace(), OPTIMIZERS[optimizer](model.parameters())
    for step in range(steps):
        optim.zero_grad()
        loss = case.loss(model, case.batch(seed=step))
        loss.backward()
        trace.record(model, loss)
        optim.step()
    return trace
