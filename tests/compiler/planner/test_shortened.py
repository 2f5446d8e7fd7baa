"""Equal blocks are one block: which stand for which, and a model that is as it was behind it."""

import pytest
import torch
from geminifx.compiler.capture.trace import CaptureRequest
from geminifx.compiler.planner.shortened import Shortened
from geminifx.compiler.planner.world.model import Model
from geminifx.models.adapters import blocks
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, factor: float = 1.0) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(8, width), factor
        self.back = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * self.back(self.linear(x).relu())


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module, counted: int | None = None) -> None:
        super().__init__()
        self.layers, self.counted = nn.ModuleList(layers), counted

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.counted or len(self.layers)):
            x = self.layers[i](x)
        return x.square().mean()


def shortened(model: nn.Module) -> Shortened:
    return Shortened.of(model, blocks(model))


def test_equal_blocks_are_left_out_but_two() -> None:
    found = shortened(Stack(*(Block(16) for _ in range(5))))
    assert found.left == ("layers.0", "layers.1")
    assert found.stands_for == ("layers.0", *["layers.1"] * 4)


@pytest.mark.parametrize("other", [Block(32), Block(16, factor=2.0)], ids=["wider", "told otherwise"])
def test_all_are_left_up_to_the_last_new_kind(other: nn.Module) -> None:
    found = shortened(Stack(Block(16), Block(16), other, Block(16), Block(16)))
    assert found.left == ("layers.0", "layers.1", "layers.2")
    assert found.stands_for == ("layers.0", "layers.1", "layers.2", "layers.1", "layers.1")


def test_blocks_that_stand_elsewhere_too_stay() -> None:
    model = Stack(*(Block(16) for _ in range(4)))
    model.first = model.layers[3]
    assert shortened(model).left == blocks(model)


def test_the_model_is_as_it_was_also_behind_an_error() -> None:
    model = Stack(*(Block(16) for _ in range(5)))
    before = list(model.named_modules())
    with pytest.raises(IndexError), shortened(model).applied(model):
        assert len(model.layers) == 2
        model.layers[4]
    assert list(model.named_modules()) == before


@pytest.mark.parametrize("counted", [None, 6], ids=["any number", "all of them"])
def test_a_model_takes_what_its_blocks_take(counted: int | None) -> None:
    """Also where it cannot do without one, and is captured as a whole."""
    model = Model.of(
        Stack(*(Block(16) for _ in range(6)), counted=counted), ((torch.zeros(4, 8),), {}), CaptureRequest()
    )
    whole = sum(p.numel() for p in Stack(*(Block(16) for _ in range(6))).parameters())
    assert len(model.parts) == 6
    assert model.numel(0, 6) == whole
    flops = sum(count * each.flops for part in model.parts for unit in part for each, count in unit.work["F"].items())
    assert flops == 6 * 2 * (2 * 4 * 8 * 16), "products of 4 x 8 with 8 x 16 and back"
    work = [sum(count * each.flops for each, count in model.parts[3][0].work[kind].items()) for kind in ("F", "I", "W")]
    assert work == [2 * 2 * 4 * 8 * 16] * 3, "each part of the backward takes what the forward does"
