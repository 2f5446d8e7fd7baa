"""A small model that is saved: with buffers, and with every kind of optimizer."""

from collections.abc import Callable

import geminifx
import torch
from shared_captures import shared_captures
from torch import nn

OPTIMIZERS: dict[str, Callable[[geminifx.CompiledModule], torch.optim.Optimizer]] = {
    "own": lambda model: model.optimizer(torch.optim.AdamW, lr=1e-2),
    "torch's": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=1e-2),
}
INPUTS = (torch.ones(8, 6),)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def compiled(seed: int = 0, precision: str | None = None, source: nn.Module | None = None) -> geminifx.CompiledModule:
    if source is not None:
        return geminifx.compile(source, example_inputs=INPUTS, precision=precision)
    with shared_captures():
        return geminifx.compile(network(seed), example_inputs=INPUTS, precision=precision)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: geminifx.CompiledModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
