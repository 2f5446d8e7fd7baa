"""Calls that look like the usual ones and mean something else: all ranks together still compute what one would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from all_ranks import run_whole
from geminifx.compiler.capture.trace import CaptureRequest, capture
from geminifx.passes.canonicalize import canonicalize
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import note, type_of
from geminifx.passes.shard import shard
from geminifx.runtime.isa.linear_cross_entropy import ABSENT
from sharding import ROUNDING, Sharded, Whole, declared, found_by_all, plan_for
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

WIDTH, WORDS, ROWS, LENGTH = 16, 32, 8, 8
MODES = (
    declared("1d", 2),
    declared("1d", 2, sequence=True),
    declared("2d", 4),
    declared("2.5d", 8, depth=2),
    declared("3d", 8),
)


class Small(nn.Module):
    """Embeddings, one residual block and a head; `loss` is the case's."""

    def __init__(self, loss: Callable[["Small", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(torch.randn(ROWS * LENGTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.row, self.one = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(1))
        self.loss = loss

    def forward(self, *, ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.words(ids)
        if position_ids is not None:
            hidden = hidden + self.places[position_ids]
        hidden = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return {"loss": self.loss(self, hidden.view(-1, WIDTH), labels.view(-1))}


def each_token(model: Small, hidden: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(model.head(hidden), labels, reduction="none", ignore_index=3)
    return (losses * losses).mean()


def scaled_product(model: Small, hidden: Tensor, labels: Tensor) -> Tensor:
    return torch.addmm(model.row, hidden, model.square, beta=0.5, alpha=2.0).square().mean()


def product_with_matrix(model: Small, hidden: Tensor, labels: Tensor) -> Tensor:
    return torch.addmm(model.places, hidden, model.square).square().mean()


def product_with_number(model: Small, hidden: Tensor, labels: Tensor) -> Tensor:
    return torch.addmm(model.one, hidden, model.square).square().mean()


def by_frequency(model: Small, hidden: Tensor, labels: Tensor) -> Tensor:
    found = F.embedding(labels, model.places, padding_idx=2, scale_grad_by_freq=True)
    return (found * hidden).square().mean()


def usual(model: Small, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.head(hidden), labels)


def sharded(loss: Callable[[Small, Tensor, Tensor], Tensor], parallel: dict[str, Any], **first: Tensor) -> Sharded:
    """A step whose batch begins with the tensors of `first`."""
    torch.manual_seed(0)
    model = Small(loss)
    batch = {**first, "ids": torch.randint(WORDS, (ROWS, LENGTH)), "labels": torch.randint(WORDS, (ROWS, LENGTH))}
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    program = capture(model, (), batch, CaptureRequest(None, "loss", True, dtypes)).program
    run_passes(program, Plan(), (canonicalize,))
    values = {f"parameter:{name}": p.detach() for name, p in model.named_parameters()}
    values |= {f"constant:{name}": value for name, value in program.constants.items()}
    values |= {f"input:{i}": value for i, value in enumerate(tree_leaves(((), batch)))}
    for position, node in program.inputs("tangent").items():
        values[f"tangent:{position}"] = torch.ones(type_of(node).shape)  # type: ignore[union-attr]
    values = {note(node).role: values[note(node).role] for node in program.placeholders}
    plan = plan_for(parallel)
    parts = Whole(program, values).shard(plan)
    return Sharded(plan.mesh, program, parts, run_whole(program, values), found_by_all(parts, plan.mesh, values))


def assert_same(found: Sharded) -> None:
    for role, expected in found.expected.items():
        assert found.error(role) <= 8 * ROUNDING * max(expected.abs().max().item(), 1.0), role


@pytest.mark.parametrize("parallel", MODES, ids=lambda parallel: parallel["tensor"]["mode"])
@pytest.mark.parametrize(
    "loss", [each_token, scaled_product, product_with_matrix, product_with_number, by_frequency, usual]
)
def test_same_numbers(loss, parallel):
    assert_same(sharded(loss, parallel))


@pytest.mark.parametrize("parallel", MODES[2:], ids=lambda parallel: parallel["tensor"]["mode"])
def test_batch_is_told_from_positions_that_come_first(parallel):
    found = sharded(usual, parallel, position_ids=torch.arange(LENGTH)[None])
    assert_same(found)
    gelu = type_of(found.program.calls(torch.ops.aten.gelu.default)[0])
    assert gelu.shape[0] < ROWS  # type: ignore[union-attr]


class Several(Small):
    """A second output that has no gradient."""

    def forward(self, *, ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.words(ids))
        return {"loss": F.cross_entropy(logits.view(-1, WORDS), labels.view(-1)), "logits": logits,
                "doubled": logits.detach() * 2}  # fmt: skip


@pytest.mark.parametrize(("outputs", "absent"), [("loss", 2), ("all", 0)])
def test_outputs_without_a_gradient_are_there_where_all_are_asked_for(outputs, absent):
    torch.manual_seed(0)
    batch = {"ids": torch.randint(WORDS, (ROWS, LENGTH)), "labels": torch.randint(WORDS, (ROWS, LENGTH))}
    model = Several(usual)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    program = capture(model, (), batch, CaptureRequest(None, outputs, True, dtypes)).program
    run_passes(program, plan_for(declared("1d", 2)), (canonicalize, shard))
    assert len(program.calls(ABSENT)) == absent


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("tp=P", "is not a partial sum"),
        ("tp=S0/3", "in 3 sections"),
        ("tp=S0/0", "in 0 sections"),
        ("tp=S2", "no dimension 2"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(placement, message):
    with pytest.raises(ValueError, match=message):
        sharded(usual, declared("1d", 2, table={"head.weight": placement}))
