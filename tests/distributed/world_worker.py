"""One rank of the test of a world that nobody described: `torchrun --nproc-per-node N world_worker.py OUT BUDGET...`.

Rank 0 writes to OUT, for each budget, how every rank shares the work, and what they learned.
"""

import os
import sys
from typing import Any

import geminifx
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

STEPS, EXAMPLES, WIDTH = 3, 8, 32


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return F.mse_loss(x, y)


def batches() -> list[tuple[Tensor, Tensor]]:
    """A step's, of all processes."""
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, EXAMPLES, WIDTH, generator=generator)) for _ in range(STEPS)]


def trained(budget: str, ranks: int) -> dict[str, Any]:
    part = EXAMPLES // ranks
    examples = tuple(values[:part] for values in batches()[0])
    model = geminifx.compile(
        Stack(),
        world_size=ranks,
        device="cpu",
        example_inputs=examples,
        device_budget=None if budget == "none" else budget,
    )
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
    size, rank, losses = model.world.examples_per_group, model.ranks.data_rank, []
    for batch in batches():
        loss = model(*(values[rank * size : (rank + 1) * size] for values in batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"way": str(model.world.chosen.way), "losses": losses, "state": model.state_dict()}


def main(out: str, budgets: list[str], ranks: int) -> None:
    found = {budget: trained(budget, ranks) for budget in budgets}
    ways: list[Any] = [None] * ranks
    dist.all_gather_object(ways, [each["way"] for each in found.values()])
    if dist.get_rank() == 0:
        torch.save({"ways": ways, **found}, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:], int(os.environ["WORLD_SIZE"]))
