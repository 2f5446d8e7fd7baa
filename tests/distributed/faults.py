"""One rank that meets faults: other models, other batches, and in the end the death of rank 1.

With the argument "staged" it meets the last alone, in a pipeline. It prints a line of JSON for each fault: what was
raised, and what it said. What is none, a batch of another shape on one rank, tells the gradient that comes of it.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from torch import nn

RANK = int(os.environ["RANK"])


def train(width: int = 8, rows: int = 2, steps: int = 1, dies_at: int = -1) -> None:
    torch.manual_seed(RANK)  # weights differ until rank 0's are taken
    model = geminifx.compile(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        if step == dies_at and RANK == 1:
            os._exit(7)
        model(torch.ones(rows, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def shorter(examples: bool = False, before: int = 0, **options: Any) -> float:
    """A batch of rank 1 is a row shorter, at once or after some others; among them an evaluation of its own."""
    inputs = {"example_inputs": (torch.ones(2, 4),)} if examples else {}
    model = geminifx.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), **inputs, **options)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.0) if examples else torch.optim.SGD(model.parameters(), lr=0.0)
    for rows in [2] * before + [2 - RANK]:
        model(torch.ones(rows, 4)).sum().backward()
        if RANK and not options:  # what is divided is brought together by all
            with torch.no_grad():
                model(torch.ones(7, 4))
    gradient = model.get_parameter("1.bias").grad.item()
    optimizer.step()
    return gradient


def share(before: int = 0) -> None:
    """Two ranks that shard tensors, each with a batch of its own, at once or behind some that are the same."""
    model = geminifx.compile(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), parallel={"tensor": "1d:2"})
    for _ in range(before):
        model(torch.ones(2, 4))
    model(torch.full((2, 4), float(RANK)))


class Layers(nn.Module):
    """Two blocks, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def staged(rows: int = 2, filled: float = 1.0, dies: bool = False) -> None:
    """A step of two ranks that have layers of their own, and one in which rank 1 has so many rows of this number."""
    model = geminifx.compile(Layers(), parallel={"pipeline": 2}, microbatches=2, example_inputs=(torch.ones(2, 4),))
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1, max_grad_norm=1.0)
    for step in range(2):
        is_other = step and RANK
        loss = model(torch.full((rows if is_other else 2, 4), filled if is_other else 1.0))
        if dies and is_other:
            os._exit(7)
        loss.backward()
        optimizer.step()


def sharded(rows: int = 2, evaluates: bool = False) -> None:
    """A step of two ranks that shard tensors, and one in which rank 1 has so many rows, or evaluates."""
    model = geminifx.compile(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), parallel={"tensor": "1d:2"})
    model(torch.ones(2, 4)).sum().backward()
    with torch.set_grad_enabled(not (evaluates and RANK)):
        model(torch.ones(rows if RANK else 2, 4))


class WithLoss(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean()


def judged(by: int | None) -> None:
    """A step of two ranks with batches of their own, and one before which rank `by` evaluates a loss, or all do."""
    model = geminifx.compile(WithLoss(4, 4))
    model(torch.ones(2, 4)).backward()
    if by in (RANK, None):
        with torch.no_grad():
            assert model(torch.full((2, 4), float(RANK))).item() > 0
    model(torch.ones(2, 4)).backward()


def one_update_less() -> None:
    """Rank 1 takes two backwards together where rank 0 updates after each."""
    model = geminifx.compile(WithLoss(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model(torch.ones(2, 4)).backward()
        if step or not RANK:
            optimizer.step()


def meet(fault: str, action: Callable[[], float | None]) -> None:
    try:
        told = action()
        found = ["", "" if told is None else str(told)]
    except Exception as error:
        found = [type(error).__name__, str(error)]
    print(json.dumps([fault, *found]), flush=True)


def main() -> None:
    meet("none", train)
    meet("world", lambda: geminifx.compile(nn.Linear(2, 2), world_size=3))
    meet("models", lambda: train(width=8 + RANK))
    meet("shorter at once", shorter)
    meet("shorter later", lambda: shorter(before=1))
    meet("shorter than examples", lambda: shorter(examples=True))
    meet("shorter, zero 2", lambda: shorter(examples=True, before=1, parallel={"data": 2, "zero": 2}))
    meet("shared", share)
    meet("shared later", lambda: share(before=2))
    meet("staged", staged)
    meet("staged, shared later", lambda: staged(filled=2.0))
    meet("staged, of another shape", lambda: staged(rows=4))
    meet("sharded", lambda: sharded(rows=3))
    meet("evaluates alone", lambda: sharded(evaluates=True))
    meet("all judge", lambda: judged(by=None))
    meet("judges alone", lambda: judged(by=1))
    meet("an update less", one_update_less)
    meet("death", lambda: train(steps=3, dies_at=1))


if sys.argv[1:] == ["staged"]:
    meet("death", lambda: staged(dies=True))
else:
    main()
os._exit(0)  # gloo's threads may abort a process that ends in order after it has lost a peer
