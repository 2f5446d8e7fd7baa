"""shard: random numbers are apart where parts are, alike where replicas are, and the same when computed again."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from all_ranks import assemble, run_on_all, run_parts, scatter
from geminifx.passes.canonicalize import canonicalize
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.program import Program, annotate, is_random, note
from geminifx.passes.program.text import parse_program
from geminifx.passes.program.types import TensorType
from geminifx.passes.recompute import recompute
from geminifx.passes.shard import shard
from geminifx.passes.sharding.engine import Sharder, Value
from geminifx.passes.sharding.modes import Role
from geminifx.runtime.isa.instructions import FORK_RNG, SWAP_RNG
from geminifx.runtime.isa.layout import contiguous_stride
from geminifx.runtime.isa.mesh import REPLICATE, Axis, Mesh, Placements, Shard, local_shape
from sharding import declared, plan_for, whole_step
from torch import Tensor
from zoo import Case, opt

AXES = (Axis("a", 2, "replica"), Axis("b", 2, "tensor"), Axis("c", 2, "tensor"))
ROWS, RATE = 64, 0.3
DROPOUTS = """
def before(x: "f32[64, 64] | input:0"):
    drop: "(f32[64, 64], b8[64, 64])" = aten.native_dropout.default(x, 0.3, True)
    y: "f32[64, 64]" = drop[0]
    kept: "b8[64, 64]" = drop[1]
    drop_1: "(f32[64, 64], b8[64, 64])" = aten.native_dropout.default(x, 0.3, True)
    kept_1: "b8[64, 64]" = drop_1[1]
    return {"output:0": y, "output:1": kept, "output:2": kept_1}
"""


def masks(placements: Placements) -> tuple[Program, list[list[Tensor]]]:
    """Of every rank what is left of ones, what was kept, and what was kept the second time."""
    program = parse_program(DROPOUTS)
    (x,), old = program.placeholders, [node for node in program.nodes if node.op == "call_function"]
    sharder = Sharder(program, AXES, {axis.name: Role("whole") for axis in AXES})
    shape = local_shape((ROWS, ROWS), placements, AXES)
    annotate(x, type=TensorType(torch.float32, shape, contiguous_stride(shape)))
    sharder.values[x] = Value(x, placements)
    for node in old:
        sharder.at = node
        sharder.lower(node)
    program.set_results({role: sharder.values[node].node for role, node in program.results.items()})
    for node in reversed(old):
        program.graph.erase_node(node)
    torch.manual_seed(0)
    found = run_parts(program, Mesh(AXES), {"input:0": scatter(torch.ones(ROWS, ROWS), placements, AXES)})
    return program, list(found.values())


@pytest.mark.parametrize(
    "placements",
    [
        (REPLICATE, REPLICATE, Shard(1)),
        (Shard(0), REPLICATE, REPLICATE),
        (Shard(0), REPLICATE, Shard(1)),
        (Shard(0), Shard(0), Shard(1)),
        (REPLICATE, Shard(1), Shard(1, 2)),
    ],
    ids=str,
)
def test_parts_drop_apart_and_replicas_alike(placements: Placements) -> None:
    _, (left, *kept) = masks(placements)
    for found in kept:
        whole = assemble(found, placements, AXES)  # which fails where replicas differ
        assert abs(whole.float().mean() - (1 - RATE)) < 5 * (RATE * (1 - RATE) / whole.numel()) ** 0.5
        different = {tuple(part.flatten().tolist()) for part in found}
        assert len(different) == 2 ** sum(isinstance(p, Shard) for p in placements)
    assert not any(torch.equal(*pair) for pair in zip(*kept, strict=True)), "a second dropout is another one"
    torch.testing.assert_close(assemble(left, placements, AXES), assemble(kept[0], placements, AXES) / (1 - RATE))


def test_replicas_draw_what_one_process_draws() -> None:
    program, (_, first, second) = masks((REPLICATE,) * 3)
    torch.manual_seed(0)
    for found in (first, second):
        expected = torch.ops.aten.native_dropout(torch.ones(ROWS, ROWS), RATE, True)[1]
        assert all(torch.equal(part, expected) for part in found)
    assert not program.calls(FORK_RNG) and not program.calls(SWAP_RNG)


DROPPING = Case("opt with dropout", lambda: opt(dropout=0.3, attention_dropout=0.3))
BLOCKS = ("model.decoder.layers.0", "model.decoder.layers.1")


@pytest.mark.parametrize("parallel", [declared("1d", 2), declared("2d", 4), declared("3d", 8)], ids=str)
def test_what_is_computed_again_drops_the_same(parallel: dict[str, Any]) -> None:
    step, found = whole_step(DROPPING), []
    plan = plan_for(parallel)
    for blocks in ((), BLOCKS):
        program = step.program.copy()
        run_passes(program, replace(plan, recompute=blocks), (canonicalize, shard, recompute))
        again = {str(n.target) for n in program.computes if note(n).recomputed and is_random(n)}
        assert again == ({"geminifx.attention.default", "aten.native_dropout.default"} if blocks else set())
        assert program.calls(FORK_RNG)
        torch.manual_seed(0)
        found.append(run_on_all(program, plan.mesh, step.values))
    plain, recomputed = found
    for role, parts in plain.items():
        assert all(map(torch.equal, parts, recomputed[role])), role
