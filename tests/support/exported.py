"""What a model and its optimizer hand out, to be compared bit by bit."""

import geminifx
import torch
from torch import Tensor


def values(model: geminifx.CompiledModule, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = optimizer.state_dict()["state"].values()
    return [*model.state_dict().values(), *(tensor.clone() for state in states for tensor in state.values())]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
