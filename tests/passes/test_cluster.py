"""cluster: equal segments of compute share a function, and nothing else changes."""

import pytest
from geminifx.passes.cluster import SHORTEST, cluster
from geminifx.passes.pipeline import PIPELINE
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import note
from geminifx.runtime.isa.instructions import PER_CHUNK


@pytest.mark.parametrize("case", ["equal_segments", "unequal_segments"])
def test_before_and_after(golden, case):
    golden(case, cluster, Plan())


def _operators(program):
    """The operators that run, in order, calls of shared functions written out."""
    for node in program.computes:
        if node.op == "call_module":
            yield from _operators(program.functions[node.target])
        elif not str(node.target).startswith("<"):  # getitem of a call's results is no operator of the model
            yield str(node.target)


def test_the_same_operators_run_in_the_same_order(stack):
    flat = stack.program.copy()
    run_passes(flat, stack.plan, PIPELINE[:-1])
    program = flat.copy()
    program.sources = {note(node).module: f"model.py:{i}" for i, node in enumerate(flat.computes)}
    cluster.rewrite(program, stack.plan)
    assert program.functions
    assert list(_operators(program)) == list(_operators(flat))
    for function in program.functions.values():
        assert len(function.computes) >= SHORTEST
        assert not {node.target for node in function.computes} & PER_CHUNK, "chunks are named by the program alone"
        assert {note(node).module for node in function.computes} <= set(function.sources), "for messages"
