"""8-bit moments beside those of bitsandbytes and torchao, whose scales are shared by as many elements."""

from collections.abc import Callable
from typing import Any

import geminifx
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

STEPS, LR = 100, 1e-3
SIZE = 64, 512
MISSING = "it is not installed: {} is compared where somebody has it"


class Pulled(nn.Module):
    """Its gradient is how far the weight is from a target, and noise."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(SIZE, generator=generator) * 0.1)
        self.register_buffer("target", torch.randn(SIZE, generator=generator) * 0.1)

    def forward(self, noise: Tensor) -> Tensor:
        return ((self.weight - self.target).square() / 2 + self.weight * noise).sum()


def trained(model: nn.Module, make: Callable[..., Optimizer]) -> Tensor:
    optimizer, generator = make(model, lr=LR, weight_decay=0.01), torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        model(torch.randn(SIZE, generator=generator) * 0.02).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()["weight"].clone()


def of_class(kind: type[Optimizer], **options: Any) -> Tensor:
    return trained(Pulled(), lambda model, **hyper: kind(model.parameters(), **hyper, **options))


def ours() -> Tensor:
    model = geminifx.compile(Pulled(), device_budget="1GB", precision="fp32", example_inputs=(torch.zeros(SIZE),))
    return trained(model, lambda model, **hyper: model.optimizer(AdamW, moments="int8", **hyper))


def check(other: Tensor) -> None:
    """After 100 steps no weight of the other's is further off than ten steps at the full rate, two in the mean; and
    ours are no further from those with exact moments than the other's are."""
    found, exact = ours(), of_class(AdamW)
    off = (found - other).abs()
    assert off.max() <= 10 * LR and off.mean() <= 2 * LR
    assert 0 < (found - exact).abs().mean() <= (other - exact).abs().mean()


def test_weights_are_near_those_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=MISSING.format("bitsandbytes"))
    check(of_class(bitsandbytes.optim.AdamW8bit, min_8bit_size=0))


@pytest.mark.slow
def test_weights_are_near_those_of_torchao() -> None:
    torchao = pytest.importorskip("torchao.optim", reason=MISSING.format("torchao"))
    check(of_class(torchao.AdamW8bit))
