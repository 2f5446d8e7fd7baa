"""One of two ranks that share out weights under a budget, with batches of other shapes.

It prints its losses, whether each chunk stays whole on the device, and what is said of a batch that is larger than the
first.
"""

import json
import os
import sys

import geminifx
import torch
from geminifx.runtime.isa.errors import BudgetError, GeminiError
from torch import Tensor, nn

RANK = int(os.environ.get("RANK", "0"))
SMALL, LARGE = 2, 200
ROWS = ((SMALL, LARGE), (LARGE, SMALL), (SMALL, SMALL), (LARGE, LARGE))
"""Of the ranks' batches, by step."""

RATE = 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)))


def inputs(step: int, rank: int) -> Tensor:
    return torch.randn(ROWS[step][rank], 32, generator=torch.Generator().manual_seed(2 * step + rank))


def compiled(budget: int | None) -> tuple[geminifx.CompiledModule, torch.optim.Optimizer]:
    model = geminifx.compile(network(), device_budget=budget, recompute="none", parallel={"data": 2, "zero": 2})
    return model, model.optimizer(torch.optim.SGD, lr=RATE)


def smallest() -> int:
    """The least budget for the largest batch."""
    try:
        compiled(1)[0](torch.ones(LARGE, 32))
    except BudgetError as refusal:
        return int(refusal.smallest_bytes)
    raise AssertionError("a byte is enough")


def train(budget: int, steps: int = len(ROWS)) -> tuple[list[float], list[list[bool]], geminifx.CompiledModule]:
    model, optimizer = compiled(budget)
    losses, stay = [], []
    for step in range(steps):
        loss = model(inputs(step, RANK)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        stay.append([chunk.resident is not None for chunk in model.session.machine.chunks])
    return losses, stay, model


def grow(budget: int) -> str:
    """What a rank is told whose batch is larger than the first."""
    model, optimizer = compiled(budget)
    for rows in (SMALL, LARGE):
        try:
            model(torch.ones(rows, 32)).sum().backward()
        except GeminiError as error:
            return str(error)
        optimizer.step()
    return ""


def main() -> None:
    budget = smallest()
    losses, stay, model = train(budget)
    evaluated = model.eval()(torch.ones(3, 32)).detach().square().mean().item()
    found = {"losses": losses, "stay": stay, "evaluated": evaluated, "said": grow(budget)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
