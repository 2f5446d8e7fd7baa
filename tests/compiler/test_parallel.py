"""The text of --parallel: what it means, and what a wrong one is told."""

from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.parallel import Parallel, parse_parallel
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Parallel()),
        ("data=2", Parallel(data=2)),
        ("data=2, tensor=2.5d:8:2", Parallel(data=2, mode="2.5d", size=8, depth=2)),
        ("pipeline=4", Parallel(pipeline=4)),
        ("pipeline=2:8,data=2", Parallel(data=2, pipeline=2, stages=8)),
        ("zero=3,tensor=1d:4,sequence", Parallel(zero=3, mode="1d", size=4, sequence=True)),
    ],
)
def test_text_means_degrees(text: str, expected: Any) -> None:
    assert Parallel.of(parse_parallel(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "data",
        "data=x",
        "dat=2",
        "data=2,data=2",
        "tensor=1d",
        "tensor=1d:2:2",
        "tensor=9d:4",
        "zero=7",
        "sequence",
        "pipeline=x",
    ],
)
def test_a_wrong_text_is_told_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match=r"--parallel .*tensor=MODE:SIZE .* such as data=2,tensor=2\.5d:8:2"):
        parse_parallel(text)


class Places(nn.Module):
    """Adds learned positions, which all rows share, to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        places, x = (second, first) if first.is_floating_point() else (first, second)
        return self.layer(x + self.table(places)).sum()


ONE_ROW_FIRST = pytest.mark.xfail(strict=True, reason="the first input's rows are taken for the batch's")


@pytest.mark.parametrize("mode", ["2d:4", "3d:8"])
@pytest.mark.parametrize("order", [(0, 1), pytest.param((1, 0), marks=ONE_ROW_FIRST)], ids=["x first", "places first"])
def test_the_batch_is_found_among_inputs_of_any_order(mode: str, order: tuple[int, int]) -> None:
    """Positions of one row, as libraries pass them, are no batch of one."""
    inputs = torch.ones(8, 4, 8), torch.arange(4)[None]
    given = tuple(inputs[i] for i in order)
    size = int(mode[-1])
    model = geminifx.compile(Places(), world_size=size, parallel={"tensor": mode}, example_inputs=given)
    assert model.plan.mesh.size == size
    rows = 4 if mode == "2d:4" else 2
    assert f"f32[{rows}, 4, " in model.graph["training"]
