"""One rank of a chain that passes a number forward and back, as a pipeline does; in step 3 rank 2 dies.

It prints lines of JSON: what is raised where the ranks do not agree, and what where one has died.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import torch
from geminifx.runtime.distributed.ranks import Exchanges, Ranks
from geminifx.runtime.isa.errors import StateError
from geminifx.runtime.isa.mesh import Axis, Mesh
from torch import distributed as dist

DYING, DIES_AT = 2, 3


def step(ranks: Ranks, value: torch.Tensor) -> None:
    """Every process waits for the one in front of it, and then for the one behind. Each runs a program of its own."""
    rank, last = ranks.rank, ranks.size - 1
    ranks.begin("the forward of a training step", Exchanges(inside=f"rank {rank}'s", common="all"), f" behind {rank}")
    if rank > 0:
        ranks.call(dist.recv, value, src=rank - 1)
    if ranks.clock.step == DIES_AT and rank == DYING:
        os._exit(7)
    if rank < last:
        ranks.call(dist.send, value, dst=rank + 1)
        ranks.call(dist.recv, value, src=rank + 1)
    if rank > 0:
        ranks.call(dist.send, value, dst=rank - 1)
    ranks.end()


def main() -> None:
    ranks = Ranks.of(lambda size: Mesh((Axis("pipeline", size, "pipeline"),)), torch.device("cpu"))
    schedule = Exchanges(inside="the program", common="a schedule" if ranks.rank != 1 else "another one")
    meet(lambda: ranks.begin("the forward", schedule))
    meet(lambda: ranks.begin("a forward" if ranks.rank else "an evaluation", Exchanges(inside="the program")))
    for ranks.clock.step in range(DIES_AT):
        step(ranks, torch.zeros(4))
    ranks.clock.step = DIES_AT
    meet(lambda: step(ranks, torch.zeros(4)))


def meet(action: Callable[[], None]) -> None:
    try:
        action()
    except StateError as error:
        print(json.dumps(str(error)), flush=True)


main()
os._exit(0)  # gloo's threads may abort a process that ends in order after it has lost a peer
