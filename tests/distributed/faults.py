"""One rank that meets faults: other models, other batches, and in the end the death of rank 1.

It prints a line of JSON for each fault: what was raised, and what it said. `faults.py examples` and
`faults.py steps` meet one alone, a batch of another shape when there are programs already, and wait for the other
rank for a few seconds.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.runtime.distributed import ranks
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


def later_batches(examples: bool) -> None:
    """The second batch of rank 1 is a row shorter; of a model with example inputs the first is."""
    inputs = {"example_inputs": (torch.ones(2, 4),)} if examples else {}
    model = geminifx.compile(nn.Linear(4, 1), **inputs)
    for rows in [2] * (not examples) + [2 - RANK]:
        model(torch.ones(rows, 4)).sum().backward()


def share() -> None:
    """Two ranks that shard tensors, each with a batch of its own."""
    model = geminifx.compile(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), parallel={"tensor": "1d:2"})
    model(torch.full((2, 4), float(RANK)))


def meet(fault: str, action: Callable[[], None]) -> None:
    try:
        action()
        found = ["", ""]
    except Exception as error:
        found = [type(error).__name__, str(error)]
    print(json.dumps([fault, *found]), flush=True)


def main(*which: str) -> None:
    if which:
        ranks.TIMEOUT_S = 10.0
        meet("later batches", lambda: later_batches(examples=which == ("examples",)))
        return
    meet("none", train)
    meet("world", lambda: geminifx.compile(nn.Linear(2, 2), world_size=3))
    meet("models", lambda: train(width=8 + RANK))
    meet("batches", lambda: train(rows=2 + RANK))
    meet("shared", share)
    meet("death", lambda: train(steps=3, dies_at=1))


main(*sys.argv[1:])
os._exit(0)  # gloo's threads may abort a process that ends in order after it has lost a peer
