"""Tests share the captures of models that are alike, and of no others; each model is followed as if it were its own."""

import geminifx
import pytest
import torch
from shared_captures import alone_for, shared_captures
from torch import Tensor, nn

BATCH = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.scale = nn.Linear(8, 8), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


class Deep(nn.Module):
    """Two blocks, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()


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


@pytest.mark.parametrize("parallel", [{"tensor": "1d:2"}, {"data": 2, "zero": 3}, {"pipeline": 2}], ids=str)
def test_what_is_planned_for_ranks_that_are_not_there_is_theirs(
    parallel: dict[str, object], captures: list[bool]
) -> None:
    """Of a model that is alike, by the same declaration."""
    options = {"example_inputs": (BATCH,), "parallel": parallel}
    options |= {"microbatches": 2} if "pipeline" in parallel else {}
    whole = geminifx.compile(Deep(), **options)
    with shared_captures(), alone_for(2):
        first = geminifx.compile(Deep(), **options)
        captures.clear()
        again = geminifx.compile(Deep(), **options)
    assert captures == []
    for model in (first, again):
        assert model.plan == whole.plan and str(model.graph["training"]) == str(whole.graph["training"])


def test_weights_in_codes_are_alike_where_their_kind_is(captures: list[bool]) -> None:
    def loss(frozen: str) -> float:
        source = Deep()
        source.layers[0].requires_grad_(False)
        with shared_captures():
            return geminifx.compile(source, example_inputs=(BATCH,), frozen=frozen)(BATCH).item()

    assert loss("nf4") == loss("nf4") and len(captures) == 1
    assert loss("int8") != loss("nf4") and len(captures) == 2
