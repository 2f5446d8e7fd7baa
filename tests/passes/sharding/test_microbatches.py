"""What the proof lets pass is right: results of the whole batch are those of its parts, put together or averaged."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from geminifx.compiler.capture.trace import CaptureRequest, capture
from geminifx.passes.canonicalize import canonicalize
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Program
from geminifx.passes.sharding.microbatches import microbatched
from geminifx.runtime.isa.errors import SplitError
from torch import Tensor, nn

COUNT, ROWS = 3, 6
Function = Callable[[Tensor], Tensor]


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def rows(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0))


def table(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IMAGES, ROW, PAIRS = rows(4, 6, 6), rows(5), rows(3, 5)
TABLE, WEIGHT, BIAS, FOUR, KERNEL = table(9, 2), table(5, 2), table(2), table(4), table(2, 4, 3, 3)
EACH = table(5).abs()
APART: dict[str, tuple[Function, Tensor]] = {
    "embedding": (lambda x: F.embedding(x.argmax(-1), TABLE), PAIRS),
    "biased product": (lambda x: torch.addmm(BIAS, x, WEIGHT), ROW),
    "group norm": (lambda x: F.group_norm(x, 2, FOUR, FOUR), IMAGES),
    "pools": (lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 3), IMAGES),
    "larger": (lambda x: F.interpolate(x, scale_factor=2.0), IMAGES),
    "convolution": (lambda x: F.conv2d(x, KERNEL, BIAS), IMAGES),
    "largest": (lambda x: x.max(-1).values + x.amin(-1) + x.logsumexp(-1) + x.var(-1), PAIRS),
    "triangle": (lambda x: x.tril() + x.triu(1), PAIRS),
    "in order": (lambda x: x.sort(-1).values + x.topk(5).values + x.flip(-1) + x.roll(2, -1), PAIRS),
    "gather": (lambda x: x.gather(1, x.argsort(1)), ROW),
    "scatter": (lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x), ROW),
    "a slice": (lambda x: x.slice_scatter(x[:, 1:3], 1, 0, 2).select_scatter(x[:, 0], 1, 2), ROW),
    "some columns": (lambda x: x.index_select(1, torch.tensor([0, 3])) + x[:, [1, 1]], ROW),
    "from a table": (lambda x: TABLE[x.argmax(-1)], PAIRS),
    "one of each row": (lambda x: x[torch.arange(len(x)), x.argmax(-1)], ROW),
    "as large as the batch": (lambda x: x + torch.ones(len(x), 5) + torch.zeros(1, 5).expand(len(x), 5), ROW),
    "columns apart": (lambda x: torch.stack(x.unbind(1)[:2], 1), PAIRS),
    "times": (lambda x: x.repeat(1, 2), ROW),
}
AVERAGED: dict[str, tuple[Function, Tensor]] = {
    "mean": (lambda x: x.mean(), PAIRS),
    "sum": (lambda x: x.sum() * 0.5, PAIRS),
    "sum by count": (lambda x: -x.square().sum() / (2 * len(x)), PAIRS),
    "losses": (lambda x: F.huber_loss(x, x + 1) + F.smooth_l1_loss(x, x * 0) - 1.0, PAIRS),
    "binary": (lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).float(), weight=EACH), PAIRS),
}
MIXED: dict[str, tuple[Function, Tensor]] = {
    "the largest of all": (lambda x: x.amax(0, keepdim=True) + x, ROW),
    "in order of examples": (lambda x: x.sort(0).values, ROW),
    "turned around": (lambda x: x.flip(0), ROW),
    "the first one": (lambda x: x - x[0], ROW),
    "summed up": (lambda x: x.cumsum(0), ROW),
    "numbered": (lambda x: x + torch.arange(len(x))[:, None], ROW),
    "by another's number": (lambda x: x[x[:, 0].argsort()], ROW),
    "of all, twice": (lambda x: x.mean() * x.mean(), ROW),
    "batch in second place": (lambda x: x.t(), ROW),
    "normalized": (lambda x: F.batch_norm(x, None, None, training=True), ROW),
}


def proven(function: Function, x: Tensor) -> Program:
    whole, part = (_captured(function, each) for each in (x, x[: ROWS // COUNT]))
    return microbatched(whole, part, COUNT)


def _captured(function: Function, x: Tensor) -> Program:
    program = capture(Applied(function), (x,), {}, CaptureRequest(backward=False)).program
    canonicalize.rewrite(program, Plan())
    return program


@pytest.mark.parametrize("name", APART)
def test_what_has_a_row_for_each_example_is_put_together(name: str) -> None:
    function, x = APART[name]
    proven(function, x)
    torch.testing.assert_close(torch.cat([function(part) for part in x.chunk(COUNT)]), function(x))


@pytest.mark.parametrize("name", AVERAGED)
def test_a_number_is_the_mean_of_the_microbatches_numbers(name: str) -> None:
    function, x = AVERAGED[name]
    program = proven(function, x)
    scaled = str(program.results["output:0"].target) == "aten.mul.Tensor" and name == "sum"
    values = [function(part) * (COUNT if scaled else 1) for part in x.chunk(COUNT)]
    torch.testing.assert_close(torch.stack(values).mean(), function(x))


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_examples_is_refused(name: str) -> None:
    with pytest.raises(SplitError):
        proven(*MIXED[name])
