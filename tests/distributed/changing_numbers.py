"""One of two ranks that shard tensors, and are called with a number that changes.

It prints its losses, how often the model was captured, and what is said where the other rank has
another number.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.compiler.programs import captures
from geminifx.runtime.isa.errors import StateError
from torch import Tensor, nn

NUMBERS = (0.1, 0.3, -0.5, 0.9)


class Scaled(nn.Module):
    """What the number is added to, multiplied with and a bound of is sharded, a sum over ranks, and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor, t: float) -> Tensor:
        hidden = (torch.tanh(self.up(x)) * t + t) @ (self.down.weight * (1 + t)).t()
        return ((1 - t) * (hidden + t) + t * t * x + hidden.clamp(min=t)).square().mean()


def seeded() -> Scaled:
    torch.manual_seed(0)
    return Scaled()


def losses(model: nn.Module) -> list[float]:
    """Of a few steps."""
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(4, 8, generator=torch.manual_seed(1))
    found = []
    for number in NUMBERS:
        optimizer.zero_grad()
        loss = model(x, number)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    made, plain = [], captures.capture

    def counted(*args: Any) -> Any:
        made.append(args)
        return plain(*args)

    captures.capture = counted
    model, said = geminifx.compile(seeded(), parallel={"tensor": "1d:2"}), ""
    found = losses(model)
    try:
        model(torch.ones(4, 8), 0.5 + int(os.environ["RANK"]))
    except StateError as error:
        said = str(error)
    sys.stdout.write(json.dumps({"losses": found, "captures": len(made), "said": said}) + "\n")


if __name__ == "__main__":
    main()
