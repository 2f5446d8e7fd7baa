"""Muon and Adafactor over a model's parameters, Muon beside AdamW, of this package's and of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geminifx
from geminifx.runtime.optimizer.chunk_optimizer import ChunkOptimizer
from torch import nn
from torch.optim import Adafactor, AdamW, Muon, Optimizer

MUON: dict[str, Any] = {"lr": 2e-2, "weight_decay": 0.1}
ADAMW: dict[str, Any] = {"lr": 3e-3}
ADAFACTOR: dict[str, Any] = {"lr": 2e-2, "weight_decay": 0.1}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices for Muon, and the rest for AdamW."""
    matrices, others = ([p for p in model.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    return [{"params": matrices}, {"params": others, "kind": AdamW, **ADAMW}]


def muon(model: geminifx.CompiledModule, **options: Any) -> ChunkOptimizer:
    return model.optimizer(Muon, groups(model), **MUON, **options)


def adafactor(model: geminifx.CompiledModule, **options: Any) -> ChunkOptimizer:
    return model.optimizer(Adafactor, **ADAFACTOR, **options)


Make = Callable[..., ChunkOptimizer]
MADE: dict[str, Make] = {"muon": muon, "adafactor": adafactor}


class Both:
    """Two optimizers of torch's, stepped together."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def of_torch(name: str, model: nn.Module) -> Any:
    if name == "adafactor":
        return Adafactor(model.parameters(), **ADAFACTOR)
    matrices, others = groups(model)
    return Both(Muon(matrices["params"], **MUON), AdamW(others["params"], **ADAMW, fused=True))
