"""The model of the README's tour: three equal blocks, trained in a budget that does not hold their state.

python examples/tour.py
"""

import geminifx
import torch
from torch import nn


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def compile_tour() -> geminifx.CompiledModule:
    model = nn.Sequential(*[Block(64) for _ in range(3)])
    example = (torch.zeros(32, 64),)
    return geminifx.compile(model, device_budget="800kB", placement="cpu", recompute="all", device="cpu",
                            example_inputs=example)  # fmt: skip


if __name__ == "__main__":
    compiled = compile_tour()
    print(compiled.plan, compiled.graph["training"], sep="\n\n")
