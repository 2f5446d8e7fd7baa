"""One rank of the test of a world that nobody described: `torchrun --nproc-per-node N world_worker.py OUT RUN...`.

Rank 0 writes to OUT, for each run, how every rank shares the work, and what they learned.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import geminifx
import torch
from geminifx.compiler.planner.problem import Planning
from geminifx.runtime.isa.errors import BudgetError
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

STEPS, EXAMPLES, WIDTH = 3, 8, 32

FAR = {"within": {"latency_s": 1e-4, "bytes_per_s": 1e7}}
"""Where sums of gradients take so long a pipeline is the fastest way."""

RUNS: dict[str, dict[str, Any]] = {
    "none": {},
    "60kB": {"device_budget": "60kB"},
    "data, refused by one": {"placement": "cuda", "recompute": "none"},
    "pipeline, refused by one": {"cluster": FAR},
}


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


@contextmanager
def refusing_once() -> Iterator[None]:
    """Within, the first program finds no room on this rank."""
    decide = Planning.decide

    def refused(*args: Any) -> Any:
        Planning.decide = decide
        raise BudgetError("no room; here")

    Planning.decide = refused
    try:
        yield
    finally:
        Planning.decide = decide


def compiled(run: str, ranks: int) -> geminifx.CompiledModule:
    options = dict(RUNS[run])
    if "cluster" in options:
        options["cluster"] = {"devices": ranks, **options["cluster"]}
    examples = tuple(values[: EXAMPLES // ranks] for values in batches()[0])
    is_refused = "refused" in run and os.environ["RANK"] == "1"
    with refusing_once() if is_refused else nullcontext():
        return geminifx.compile(Stack(), world_size=ranks, device="cpu", example_inputs=examples, **options)


def trained(run: str, ranks: int) -> dict[str, Any]:
    model = compiled(run, ranks)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
    size, rank, losses = model.world.examples_per_group, model.ranks.data_rank, []
    for batch in batches():
        loss = model(*(values[rank * size : (rank + 1) * size] for values in batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"way": str(model.world.chosen.way), "notes": model.world.notes, "losses": losses,
            "state": model.state_dict()}  # fmt: skip


def main(out: str, runs: list[str], ranks: int) -> None:
    found = {run: trained(run, ranks) for run in runs}
    ways: list[Any] = [None] * ranks
    dist.all_gather_object(ways, [each["way"] for each in found.values()])
    if dist.get_rank() == 0:
        torch.save({"ways": ways, **found}, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:], int(os.environ["WORLD_SIZE"]))
