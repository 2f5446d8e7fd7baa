"""overlap: collectives run while something computes, small sums are taken together, and all numbers stay the same."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from all_ranks import run_on_all, run_parts
from geminifx.passes.canonicalize import canonicalize
from geminifx.passes.overlap import IN_FLIGHT, overlap
from geminifx.passes.partition import partition
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Note, Program
from geminifx.passes.program.types import TensorType
from geminifx.passes.program.verify import overlapped, turned, verify
from geminifx.passes.recompute import recompute
from geminifx.runtime.isa.instructions import (
    ALL_GATHER,
    ALL_REDUCE,
    COLLECTIVES,
    FINISH_COLLECTIVE,
    REDUCE_SCATTER,
    START_ALL_GATHER,
    STARTS,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from more_models import LLAMA_OF_FOUR
from sharding import declared, plan_for, whole_step
from zoo import OPT, Case

aten = torch.ops.aten

MODES = {
    "1d": declared("1d", 2),
    "1d, sequence": declared("1d", 4, sequence=True),
    "2d": declared("2d", 4),
    "2.5d": declared("2.5d", 8, depth=2),
    "3d": declared("3d", 8),
}


@pytest.mark.parametrize("case", ["gathers_one_ahead", "gradients", "sums_together"])
def test_before_and_after(golden, case):
    golden(case, overlap, plan_for(declared("1d", 2)))


def test_alone_nothing_changes(captured, same):
    program, plan = captured
    run_passes(program, plan, (canonicalize, partition))
    before = program.copy()
    overlap.rewrite(program, plan)
    same(program, before)


def both(case: Case, parallel: dict[str, Any], blocks: tuple[str, ...] = ()) -> tuple[Program, Program, Plan]:
    """A rank's program before and after the pass."""
    plan = replace(plan_for(parallel), recompute=blocks)
    before = whole_step(case).shard(plan)
    run_passes(before, plan, (canonicalize, recompute, partition))
    after = before.copy()
    start_collectives_early(after, plan)
    return before, after, plan


def start_collectives_early(program: Program, plan: Plan) -> None:
    overlap.rewrite(program, plan)
    verify(program, plan, (turned, overlapped), "overlap")


def most_under_way(program: Program) -> int:
    most = count = 0
    for node in program.computes:
        count += (node.target in STARTS) - (node.target is FINISH_COLLECTIVE)
        most = max(most, count)
    assert count == 0
    return most


def check_same(before: Program, after: Program, plan: Plan, values: dict[str, torch.Tensor]) -> None:
    """Every rank finds the same bits."""
    torch.manual_seed(0)
    expected = run_on_all(before, plan.mesh, values)
    torch.manual_seed(0)
    found = run_on_all(after, plan.mesh, values)
    assert expected.keys() == found.keys()
    for role, parts in expected.items():
        for part, other in zip(parts, found[role], strict=True):
            assert torch.equal(part.nan_to_num(), other.nan_to_num()) and torch.equal(part.isnan(), other.isnan()), role


LAYER = {"opt": "model.decoder.layers.0", "llama": "model.layers.0"}


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [OPT, LLAMA_OF_FOUR], ids=list(LAYER))
def test_models_compute_the_same_bits(case: Case, mode: str, recomputed: bool) -> None:
    name = LAYER["opt" if case is OPT else "llama"]
    before, after, plan = both(case, MODES[mode], (name,) if recomputed else ())
    check_same(before, after, plan, whole_step(case).values)
    assert most_under_way(after) <= IN_FLIGHT
    assert exchanged(after) < exchanged(before) or mode.startswith("1d"), "biases' sums are taken together"


def exchanged(program: Program) -> int:
    return sum(node.target in STARTS | COLLECTIVES for node in program.computes)


@pytest.mark.parametrize("mode", ["2d", "2.5d"])
def test_products_run_beside_the_gathers_of_weights(mode: str) -> None:
    _, program, _ = both(OPT, MODES[mode])
    parameters = set(program.inputs("parameter").values())
    hidden = []
    for start in program.calls(START_ALL_GATHER):
        if start.args[0] in parameters:
            node, beside = start.next, []
            while node.target is not FINISH_COLLECTIVE or node.args[0] is not start:
                beside.append(node.target)
                node = node.next
            hidden.append(not {aten.mm.default, aten.addmm.default}.isdisjoint(beside))
    # Not of the first of each phase; nor of the one behind attention, beside which that runs.
    assert len(hidden) > 20 and sum(hidden) >= 0.7 * len(hidden)


# -- any program -------------------------------------------------------------------------------------------

OPERATIONS: dict[str, tuple[Any, ...]] = {
    "compute": (aten.tanh.default,),
    "transpose": (aten.t.default,),
    "sum over rows": (ALL_REDUCE, "row", "sum"),
    "sum over columns": (ALL_REDUCE, "col", "sum"),
    "largest": (ALL_REDUCE, "row", "max"),
    "gather rows": (ALL_GATHER, 0, "row", 2),
    "gather columns": (ALL_GATHER, 1, "col", 2),
    "scatter rows": (REDUCE_SCATTER, 0, "col", 2),
    "scatter columns": (REDUCE_SCATTER, 1, "row", 2),
}


def program_of(steps: list[tuple[str, int]]) -> Program:
    """Operators on squares, each of any value before it, which may overwrite a buffer."""
    program, square = Program("training"), TensorType(torch.float32, (4, 4), (4, 1))
    values = [program.add_input(name, square, role) for name, role in (("x", "input:0"), ("b", "buffer:b"))]
    program.set_results({})
    emit = partial(program.emit, before=program.output, like=Note())
    for name, place in steps:
        value = values[place % len(values)]
        if name == "overwrite":
            emit(aten.copy_.default, (values[1], emit(aten.tanh.default, (value,))))
            continue
        target, *arguments = OPERATIONS[name]
        value = emit(target, (value, *arguments))
        if target is ALL_GATHER:
            value = emit(aten.slice.Tensor, (value, arguments[0], 0, 4))
        elif target is REDUCE_SCATTER:
            value = emit(aten.cat.default, ([value, value], arguments[0]))
        values.append(value)
    unread = [value for value in values[2:] if not value.users]
    program.set_results({f"output:{i}": value for i, value in enumerate(unread)})
    return program


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([*OPERATIONS, "overwrite"]), st.integers(0, 15)), min_size=1, max_size=16))
def test_any_program_computes_the_same_bits(steps: list[tuple[str, int]]) -> None:
    plan, before = plan_for(declared("2d", 4)), program_of(steps)
    after = before.copy()
    start_collectives_early(after, plan)
    assert most_under_way(after) <= IN_FLIGHT
    parts = {role: list(torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)).unbind())
             for i, role in enumerate(("input:0", "buffer:b"))}  # fmt: skip
    expected, found = (
        run_parts(program, plan.mesh, {role: [part.clone() for part in values] for role, values in parts.items()})
        for program in (before, after)
    )
    for role, values in expected.items():
        assert all(map(torch.equal, values, found[role])), role
