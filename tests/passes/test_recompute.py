"""recompute: what is kept, what is computed again, and that random draws are the same again."""

import pytest
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import note
from geminifx.passes.program.text import parse_program
from geminifx.passes.recompute import recompute
from geminifx.runtime.isa.instructions import SAVE_RNG, SWAP_RNG


@pytest.mark.parametrize(
    "case, blocks",
    [
        ("output_is_kept", ("layers.0",)),
        ("random_is_replayed", ("layers.0",)),
        ("nested_names", ("layers.1",)),
        ("nothing_to_recompute", ("layers.0",)),
    ],
)
def test_before_and_after(golden, case, blocks):
    golden(case, recompute, Plan(recompute=blocks))


NESTED = """
def training(x: "f32[4] | input:0", tangent: "f32[4] | tangent:0"):
    # forward: a
    h: "f32[4]" = aten.sin.default(x)
    # forward: a.b
    d: "f32[4]" = aten.bernoulli.p(h, 0.5)
    e: "f32[4]" = aten.mul.Tensor(d, h)
    # forward: a
    y: "f32[4]" = aten.exp.default(e)
    # backward: a.b
    dh: "f32[4]" = aten.mul.Tensor(tangent, d)
    # backward: a
    dx: "f32[4]" = aten.mul.Tensor(dh, h)
    return {"output:0": y, "gradient:input:0": dx}
"""


@pytest.mark.parametrize("blocks", [("a.b", "a"), ("a", "a.b"), ("a", "a")])
def test_a_block_inside_another_draws_the_forward_mask_once_more(blocks):
    program = parse_program(NESTED)
    recompute.rewrite(program, Plan(recompute=blocks))
    (state,) = program.calls(SAVE_RNG)
    assert note(state).phase == "forward"
    drawn = [node.name for node in program.computes if str(node.target) == "aten.bernoulli.p"]
    assert drawn == ["d", "d_1"]
    order = program.positions()
    first, last = (order[node] for node in program.calls(SWAP_RNG))
    assert first < order[program.nodes[-1].args[0]["gradient:input:0"]]
    copy = next(node for node in program.nodes if node.name == "d_1")
    assert first < order[copy] < last
    assert {node.args[0] for node in program.calls(SWAP_RNG)} == {state}


def test_an_unknown_block_changes_nothing(captured, same):
    program, _ = captured
    before = program.copy()
    recompute.rewrite(program, Plan(recompute=("no.such.block",)))
    same(program, before)


def test_the_backward_reads_no_forward_value_of_the_block_but_kept_ones(captured):
    program, plan = captured
    recompute.rewrite(program, plan)
    block = plan.recompute[0]
    inside = [n for n in program.computes if note(n).module.startswith(block + ".") or note(n).module == block]
    forward = {n for n in inside if note(n).phase == "forward" and n.target is not SAVE_RNG}
    for value in forward:
        phases = {note(user).phase for user in value.users if user not in forward and user.op != "output"}
        outside = any(note(u).phase == "forward" and u not in forward and u.target is not SAVE_RNG for u in value.users)
        is_result = any(user.op == "output" for user in value.users)
        assert "backward" not in phases or outside or is_result, value.name
