"""fuse_gradients: gradients are computed in their chunks, in less memory and of the same bits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from geminifx import CompiledModule
from geminifx.compiler import lowering
from geminifx.compiler.planner.costs import flops
from geminifx.compiler.planner.liveness import ACTIVATIONS, GRADIENT_BUFFERS, analyse
from geminifx.passes.cluster import cluster
from geminifx.passes.fuse_gradients import MM, SUM, VIEW, fuse_gradients
from geminifx.passes.pipeline import PIPELINE
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import note, tensor_type
from geminifx.runtime.isa.instructions import PUT, PUT_MM, PUT_SUM
from optimizing import ADAMW, NET, Loop, placed, same_weights
from torch import fx
from zoo import GPT2, LLAMA, OPT, Case, compiled, train

BEFORE = PIPELINE[: PIPELINE.index(fuse_gradients)]
WITHOUT = tuple(current for current in PIPELINE if current is not fuse_gradients)


@pytest.mark.parametrize("case", ["products", "what_stays"])
def test_before_and_after(golden, case):
    golden(case, fuse_gradients, Plan())


def test_every_product_and_sum_that_is_put_alone_is_computed_in_its_place(captured):
    program, plan = captured
    run_passes(program, plan, BEFORE)
    puts = [put.args for put in program.calls(PUT)]
    products = [(chunk.name, offset, *value.args) for chunk, offset, value in puts if value.target is MM]
    sums = [(chunk.name, offset, *read_by(value)) for chunk, offset, value in puts if read_by(value)]
    others = [put for put in puts if put[2].target is not MM and not read_by(put[2])]
    fuse_gradients.rewrite(program, plan)
    assert products and [(put.args[0].name, *put.args[1:]) for put in program.calls(PUT_MM)] == products
    assert [(put.args[0].name, *put.args[1:]) for put in program.calls(PUT_SUM)] == sums
    assert [put.args for put in program.calls(PUT)] == others
    assert {note(put).phase for put in (*program.calls(PUT_MM), *program.calls(PUT_SUM))} == {"backward"}


def read_by(gradient: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """What is summed to this gradient, reshaped or not, and over which dimensions."""
    value = gradient.args[0] if gradient.target is VIEW else gradient
    if value.target is not SUM:
        return None
    return value.args[0], [dim % len(tensor_type(value.args[0]).shape) for dim in value.args[1]]


def test_inductor_keeps_its_sums(captured):
    program, plan = captured
    run_passes(program, plan, BEFORE)
    fuse_gradients.rewrite(program, replace(plan, request=replace(plan.request, kernels="fused")))
    assert program.calls(PUT_MM) and not program.calls(PUT_SUM)


def test_evaluation_is_left_alone(evaluation, same):
    program, plan = evaluation
    run_passes(program, plan, BEFORE)
    before = program.copy()
    fuse_gradients.rewrite(program, plan)
    same(program, before)


def test_functions_put_products_too(stack):
    program = stack.program.copy()
    run_passes(program, stack.plan, PIPELINE)
    assert any(function.calls(PUT_MM) for function in program.functions.values())


def test_a_step_computes_as_much_in_no_more_memory(captured):
    program, plan = captured
    before = program.copy()
    for current, passes in ((before, WITHOUT), (program, PIPELINE)):
        run_passes(current, plan, [p for p in passes if p is not cluster])
    old, new = (sum(map(flops, current.computes)) for current in (before, program))
    assert new == old > 0
    old_live, new_live = analyse(before), analyse(program)
    assert new_live.total().max() <= old_live.total().max()
    assert new_live.values[ACTIVATIONS].sum() < old_live.values[ACTIVATIONS].sum()
    assert new_live.values[GRADIENT_BUFFERS].max() == old_live.values[GRADIENT_BUFFERS].max()


# -- numbers -----------------------------------------------------------------------------------------------


def with_and_without(monkeypatch: pytest.MonkeyPatch, build: Callable[[], CompiledModule]) -> list[CompiledModule]:
    """The model that `build` compiles, and the same one by the pipeline without the pass."""
    model = build()
    with monkeypatch.context() as patched:
        patched.setattr(lowering, "PIPELINE", WITHOUT)
        other = build()
    found = ["geminifx.put_mm" in each.graph["training"] for each in (model, other)]
    assert found == [True, False]
    return [model, other]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [OPT, GPT2, LLAMA], ids=lambda case: case.name)
def test_models_find_the_same_bits(monkeypatch: pytest.MonkeyPatch, case: Case, precision: str) -> None:
    models = with_and_without(monkeypatch, lambda: compiled(case, placement="cpu", precision=precision))
    found, expected = (train(case, model, steps=2) for model in models)
    assert torch.equal(torch.stack(found.losses), torch.stack(expected.losses))
    for gradients, others in zip(found.gradients, expected.gradients, strict=True):
        assert all(torch.equal(gradients[name], others[name]) for name in others)
    assert models[0].stats.device_peak_bytes <= models[1].stats.device_peak_bytes


@pytest.mark.parametrize("in_backward", [False, True])
def test_our_optimizer_finds_the_same_bits(monkeypatch: pytest.MonkeyPatch, in_backward: bool) -> None:
    models = with_and_without(monkeypatch, lambda: placed(NET, "mixed", "bf16"))
    kind, hyper = ADAMW
    for model in models:
        Loop().run(NET, model, model.optimizer(kind, in_backward=in_backward, **hyper))
    assert same_weights(*models)
