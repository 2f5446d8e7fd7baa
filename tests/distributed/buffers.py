"""One of two ranks whose forward writes to buffers, beside torch's DistributedDataParallel.

Into OUT it writes what both end with, and the losses of a run that goes on beside those of one that is resumed.
"""

import os
import sys
from pathlib import Path
from typing import Any

import geminifx
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

RANK = int(os.environ["RANK"])
WAYS: dict[str, dict[str, Any]] = {
    "data": {"parallel": {"data": 2}},
    "zero 3": {"parallel": {"data": 2, "zero": 3}},
}


class Centred(nn.Module):
    """Computes with what it writes, `center`, and has statistics that only an evaluation reads, and a count that
    evaluations write, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("center", torch.zeros(8))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        h = self.norm(self.linear(x))
        if self.training:
            self.center.mul_(0.5).add_(h.detach().square().mean(0) * 0.5)
        return h - self.center


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * number + RANK))
    loss = model(x).pow(4).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def compiled(way: str) -> tuple[geminifx.CompiledModule, torch.optim.Optimizer]:
    model = geminifx.compile(Centred(), example_inputs=(torch.zeros(4, 8),), precision="fp32", **WAYS[way])
    return model, model.optimizer(torch.optim.SGD, lr=0.1)


def trained(way: str, folder: Path) -> dict[str, Any]:
    model, optimizer = compiled(way)
    plain = DistributedDataParallel(Centred())
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    losses = [(step(model, optimizer, number), step(plain, sgd, number)) for number in range(3)]
    ours, theirs = ({name: v.clone() for name, v in each.state_dict().items()} for each in (model, plain.module))
    geminifx.save_checkpoint(model, optimizer, folder / way)
    if RANK == 0 and way == "data":  # an evaluation may run on some ranks only, where each has all weights
        with torch.no_grad():
            model.eval()(torch.ones(2, 8))
        model.train()
    on = [step(model, optimizer, number) for number in (3, 4)]
    again, resumed = compiled(way)
    geminifx.load_checkpoint(again, resumed, folder / way)
    return {"losses": losses, "ours": ours, "theirs": theirs, "on": on,
            "resumed": [step(again, resumed, number) for number in (3, 4)]}  # fmt: skip


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.save({way: trained(way, out) for way in WAYS}, out / f"{RANK}.pt")
