"""Gradual unfreezing on several processes, beside plain PyTorch on the whole batch: thawing.py WAY FOLDER

With a third argument, of device bytes, one rank has no room for a thaw: all refuse it and go on without.
"""

import sys
from pathlib import Path
from typing import Any

import geminifx
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

WIDTH, DEPTH, CLASSES, RANKS, STEPS = 32, 4, 3, 2, 5
HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "data": {"parallel": {"data": 2}},
    "zero 1": {"parallel": {"data": 2, "zero": 1}},
    "zero 3": {"parallel": {"data": 2, "zero": 3}},
    "zero 3, bf16": {"parallel": {"data": 2, "zero": 3}, "precision": "bf16"},
    "tensor": {"parallel": {"tensor": "1d:2"}},
    "pipeline": {"parallel": {"pipeline": 2}, "microbatches": 2},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.blocks.requires_grad_(False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x), labels)


def batch(step: int, part: slice = slice(None)) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(step)
    x, labels = torch.randn(8, WIDTH, generator=random), torch.randint(CLASSES, (8,), generator=random)
    return {"x": x[part], "labels": labels[part]}


def trained(model: Any, source: Tower, optimizer: torch.optim.Optimizer, part: slice) -> list[float]:
    """The losses of steps of the head, with the second block from the second step on and the first from the fourth."""
    losses = []
    for step in range(STEPS):
        if step in (1, 3):
            thawed = source.blocks[DEPTH - 3 if step == 1 else 0].requires_grad_(True)
            optimizer.add_param_group({"params": list(thawed.parameters())})
        loss = model(**batch(step, part))
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def main(way: str, folder: str) -> None:
    source, plain = Tower(), Tower()
    model = geminifx.compile(source, device="cpu", world_size=RANKS, **WAYS[way])
    optimizer = model.optimizer(AdamW, list(source.head.parameters()), **HYPER)
    rank = model.ranks.rank
    part = slice(4 * rank, 4 * rank + 4) if model.ranks.mesh.data_size > 1 else slice(None)
    losses = trained(model, source, optimizer, part)
    expected = trained(plain, plain, AdamW(plain.head.parameters(), **HYPER), slice(None))
    told = {"losses": losses, "expected": expected, "weights": model.state_dict(), "plain": plain.state_dict()}
    torch.save(told, Path(folder) / f"{rank}.pt")


def refused(way: str, folder: str, budget_bytes: str) -> None:
    """Writes what a thaw raises, and whether the losses of steps before and after are those of a run without it."""
    source, reference = Tower(), Tower()
    options = {"device": "cpu", "world_size": RANKS, "placement": "cuda", "recompute": "none", **WAYS[way]}
    model = geminifx.compile(source, device_budget=int(budget_bytes), **options)
    plain = geminifx.compile(reference, **options)
    optimizer, expected = (each.optimizer(AdamW, each.parameters(), **HYPER) for each in (model, plain))
    rank, told, same = model.ranks.rank, "", True
    rows = 128 if rank and way == "data" else 4  # the second rank's batch is the larger one
    for step in range(4):
        random = torch.Generator().manual_seed(step)
        x, labels = torch.randn(rows, WIDTH, generator=random), torch.randint(CLASSES, (rows,), generator=random)
        if step == 2:
            source.blocks.requires_grad_(True)
            try:
                model(x, labels)
            except geminifx.GeminiError as error:
                told = str(error)
            source.blocks.requires_grad_(False)
        losses = [each(x, labels) for each in (model, plain)]
        for loss, optim in zip(losses, (optimizer, expected), strict=True):
            loss.backward()
            optim.step()
            optim.zero_grad()
        same = same and torch.equal(*losses)
    trained = sum(chunk.trainable for chunk in model.plan.layout.chunks)
    torch.save({"told": told, "same": same, "trained": trained}, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    (main if len(sys.argv) == 3 else refused)(*sys.argv[1:])
