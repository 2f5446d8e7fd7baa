"""Tests share the captures of models that are alike, and of no others; each model is followed as if it were its own."""

import geminifx
import pytest
import torch
from shared_captures import shared_captures
from torch import Tensor, nn

BATCH = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.scale = nn.Linear(8, 8), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


def compiled(source: nn.Module) -> geminifx.CompiledModule:
    with shared_captures():
        return geminifx.compile(source, example_inputs=(BATCH,))


def test_each_model_has_its_own_weights_and_is_followed(captures: list[bool]) -> None:
    models = [compiled(Scaled(seed)) for seed in range(2)]
    assert len(captures) == 1
    for seed, model in enumerate(models):
        assert torch.equal(model(BATCH), Scaled(seed)(BATCH))
    assert len(captures) == 1
    models[1].source.scale = 3.0
    assert torch.equal(models[1](BATCH), Scaled(1)(BATCH) * 1.5) and len(captures) == 2
    assert torch.equal(models[0](BATCH), Scaled(0)(BATCH)) and len(captures) == 2


@pytest.mark.parametrize("change", ["number", "mode", "frozen"])
def test_others_are_captured_anew(change: str, captures: list[bool]) -> None:
    source = Scaled(0)
    compiled(source)
    captures.clear()
    other = Scaled(0)
    if change == "number":
        other.scale = 4.0
    elif change == "mode":
        other.eval()
    else:
        other.layer.bias.requires_grad_(False)
    model = compiled(other)
    assert len(captures) == 1 and torch.equal(model(BATCH), other(BATCH))
