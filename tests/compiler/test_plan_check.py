"""A plan made by hand is looked at before anything is moved."""

from collections.abc import Callable
from dataclasses import replace

import geminifx
import pytest
import torch
from geminifx.compiler.plan_check import check_plan
from geminifx.compiler.precision import parameter_dtypes
from geminifx.passes.plan import Plan, Residency
from geminifx.runtime.layout import ChunkLayout, Layout
from torch import nn


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


def plan() -> Plan:
    return geminifx.compile(model(), example_inputs=(torch.zeros(2, 4),), placement="cpu").plan


def check(changed: Plan) -> None:
    source = model()
    check_plan(changed, dict(source.named_parameters()), ("0", "1"), parameter_dtypes(source, None))


def with_chunk(whole: Plan, **changes: object) -> Plan:
    first: ChunkLayout = replace(whole.layout.chunks[0], **changes)  # type: ignore[arg-type]
    return replace(whole, layout=Layout((first, *whole.layout.chunks[1:])))


def with_slot(whole: Plan, **changes: object) -> Plan:
    first, *others = whole.layout.chunks[0].slots
    return with_chunk(whole, slots=(replace(first, **changes), *others))  # type: ignore[arg-type]


def test_the_planners_own_plan_passes() -> None:
    check(plan())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: replace(p, residency=Residency(weights=frozenset({99}))), "residency.weights has chunk 99"),
        (lambda p: replace(p, recompute=("7",)), "recompute has '7', expected blocks of the model: 0, 1"),
        (lambda p: replace(p, optimizer_state_bytes=-8), "optimizer_state_bytes is -8"),
        (lambda p: with_chunk(p, index=3), r"chunks\[0\].index is 3, expected 0"),
        (lambda p: with_chunk(p, trainable=False), "is in a frozen chunk"),
        (lambda p: with_chunk(p, dtype=torch.float64), "float64, expected torch.float32"),
        (lambda p: with_chunk(p, numel=8), "expected an end within the chunk's 8"),
        (lambda p: with_chunk(p, slots=p.layout.chunks[0].slots[1:]), "no slot for"),
        (lambda p: with_slot(p, shape=(4, 8)), "has shape"),
        (lambda p: with_slot(p, offset=1), "expected a multiple of 64 elements"),
        (lambda p: with_slot(p, offset=64), "behind the parameter before it"),
        (lambda p: with_slot(p, name="stranger"), "a slot for stranger"),
    ],
)
def test_what_does_not_fit_is_named(damage: Callable[[Plan], Plan], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(damage(plan()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"example_inputs": torch.zeros(2, 4)}, r"example_inputs=\(x,\)"),
        ({"recompute": 3}, "names of blocks"),
        ({"optimizer_state_bytes": "8"}, "whole number"),
        ({"optimizer_state_bytes": -8}, "0 or more"),
        ({"parallel": "tensor"}, "degrees by name"),
        ({"placement": "gpu"}, "did you mean 'cuda'"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geminifx.compile(model(), **options)


def test_lists_and_single_passes_are_taken() -> None:
    @geminifx.graph_pass(after="chunk")
    def look(program: object, plan: Plan) -> None:
        assert plan.recompute == ("0",)

    compiled = geminifx.compile(model(), example_inputs=[torch.zeros(2, 4)], recompute=["0"], passes=look)
    assert compiled.plan.recompute == ("0",)


def test_only_modules_are_compiled() -> None:
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
        geminifx.compile(None)  # type: ignore[arg-type]
