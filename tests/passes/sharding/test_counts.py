"""shard: what a 2.5d mesh exchanges and holds is what its authors count."""

from math import prod

import pytest
from geminifx.passes.program.program import Program, note, type_of
from geminifx.passes.program.text import parse_program
from geminifx.runtime.isa.instructions import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from sharding import Whole, declared, plan_for, whole_step
from torch import fx
from zoo import OPT

ROWS, INTO, OUT = 36, 36, 72
LINEARS = f"""
def training(
    x: "f32[{ROWS}, {INTO}] | input:0",
    w1: "f32[{INTO}, {INTO}] | parameter:fc1.weight",
    w2: "f32[{OUT}, {INTO}] | parameter:fc2.weight",
    tangent_0: "f32[{ROWS}, {OUT}] | tangent:0",
):
    # forward: fc1
    t: "f32[{INTO}, {INTO}]{{1, {INTO}}}" = aten.t.default(w1)
    y: "f32[{ROWS}, {INTO}]" = aten.mm.default(x, t)
    # forward: fc2
    t2: "f32[{INTO}, {OUT}]{{1, {INTO}}}" = aten.t.default(w2)
    z: "f32[{ROWS}, {OUT}]" = aten.mm.default(y, t2)
    # forward
    r: "f32[{ROWS}, {OUT}]" = aten.relu.default(z)
    # backward
    dz: "f32[{ROWS}, {OUT}]" = aten.threshold_backward.default(tangent_0, r, 0)
    # backward: fc2
    dz_t: "f32[{OUT}, {ROWS}]{{1, {OUT}}}" = aten.t.default(dz)
    dw2: "f32[{OUT}, {INTO}]" = aten.mm.default(dz_t, y)
    dy: "f32[{ROWS}, {INTO}]" = aten.mm.default(dz, w2)
    # backward: fc1
    dy_t: "f32[{INTO}, {ROWS}]{{1, {INTO}}}" = aten.t.default(dy)
    dw1: "f32[{INTO}, {INTO}]" = aten.mm.default(dy_t, x)
    return {{"output:0": r, "gradient:fc1.weight": dw1, "gradient:fc2.weight": dw2}}
"""


def received(node: fx.Node, sizes: dict[str, int]) -> int:
    """Elements that a rank has from others once it has taken part in a collective along a ring."""
    ranks = sizes[node.args[1] if node.target is ALL_REDUCE else node.args[2]]
    part, result = prod(type_of(node.args[0]).shape), prod(type_of(node).shape)
    if node.target is ALL_GATHER:
        return result - part
    return (2 if node.target is ALL_REDUCE else 1) * part * (ranks - 1) // ranks


@pytest.mark.parametrize(("side", "depth"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2)])
def test_elements_received_for_a_linear_layer(side: int, depth: int) -> None:
    plan = plan_for(declared("2.5d", side * side * depth, depth=depth))
    program = Whole(parse_program(LINEARS), {}).shard(plan)
    sizes = {axis.name: axis.size for axis in plan.mesh.axes}
    counts = {"forward": 0, "backward": 0}
    for target in (ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER):
        for node in program.calls(target):
            if note(node).module == "fc2":
                counts[note(node).phase] += received(node, sizes)
    activations = ROWS * INTO // (depth * side**2), ROWS * OUT // (depth * side**2)
    weight = INTO * OUT // side**2
    assert counts["forward"] == (side - 1) * (activations[0] + weight)
    # The input's gradient is scattered; for the weight's the input is gathered once more, which saves its memory, or
    # has been kept; the weight is gathered again, its gradient scattered. The sum over the layers is taken by chunk.
    kept, again = ((side - 1) * (activations[0] + 2 * weight), (side - 1) * activations[0])
    assert counts["backward"] in (kept, kept + again)
    gradient = program.results["gradient:fc2.weight"]
    assert (prod(type_of(gradient).shape), "depth=P" in note(gradient).placement) == (weight, depth > 1)


def test_twice_the_depth_is_half_the_activations_at_the_same_batch() -> None:
    held = [activations(whole_step(OPT).shard(plan_for(declared("2.5d", size, depth=depth))))
            for size, depth in ((4, 1), (8, 2))]  # fmt: skip
    assert held[0] == 2 * held[1]


def activations(program: Program) -> int:
    """Elements of a rank's values that have a part of the batch, over the whole forward."""
    reached, count = set(program.inputs("input").values()), 0
    for node in program.computes:
        if note(node).phase == "forward" and reached & set(node.all_input_nodes):
            reached.add(node)
            types = type_of(node)
            large = not isinstance(types, tuple) and types.dtype.is_floating_point and prod(types.shape) > 1
            count += prod(types.shape) if large else 0
    return count
