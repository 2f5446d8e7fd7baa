"""The whole pipeline on captured models: structure, and the same numbers after every pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from geminifx.passes import pipeline
from geminifx.passes.pipeline import PIPELINE
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.program import note
from geminifx.passes.program.text import print_program
from geminifx.passes.program.verify import all_readers
from geminifx.runtime.isa.instructions import (
    ACCUMULATE_GRAD,
    FETCH,
    OFFLOAD,
    REDUCE,
    RELEASE,
    TURN,
    WAIT,
)
from geminifx.runtime.isa.layout import ALIGNMENT_BYTES, parameter_view


def test_every_pass_has_its_file_and_finds_what_it_requires():
    known = []
    for current in PIPELINE:
        assert Path(pipeline.__file__).with_name(f"{current.name}.py").exists()
        assert set(current.requires) <= set(known), current.name
        known = [fact for fact in (*known, *current.gives) if fact not in current.breaks]
    order = [current.name for current in PIPELINE]
    assert order.index("partition") < order.index("chunk") < order.index("release") < order.index("cluster")
    assert len(set(order)) == len(order)


def test_every_parameter_is_in_exactly_one_slot(captured):
    program, plan = captured
    slots = [(chunk, slot) for chunk in plan.layout.chunks for slot in chunk.slots]
    names = [slot.name for _, slot in slots]
    tied = dict(plan.layout.tied)
    assert sorted(names + list(tied)) == sorted(program.inputs("parameter"))
    assert set(tied.values()) <= set(names) and not set(tied) & set(names)
    for chunk in plan.layout.chunks:
        end = 0
        for slot in chunk.slots:
            assert slot.offset >= end and slot.offset * chunk.dtype.itemsize % ALIGNMENT_BYTES == 0
            end = slot.offset + slot.numel
        assert end <= chunk.numel
    assert [chunk.index for chunk in plan.layout.chunks] == list(range(len(plan.layout.chunks)))


def test_chunks_come_and_go_in_order(captured):
    program, plan = captured
    run_passes(program, plan, PIPELINE)
    order = program.positions()
    (turn,) = program.calls(TURN)
    seen = set()
    for wait in program.calls(WAIT):
        fetch, chunk = wait.args
        phase = note(wait).phase
        assert (phase, chunk) not in seen, "fetched twice in one phase"
        seen.add((phase, chunk))
        readers = all_readers(wait)
        releases = [node for node in readers if node.target is RELEASE]
        assert len(releases) == 1 and readers - set(releases)
        assert order[fetch] < order[wait] < min(map(order.__getitem__, readers))
        assert max(readers, key=order.__getitem__) is releases[0]
        sides = {order[node] < order[turn] for node in (fetch, wait, *releases)}
        assert sides == {phase == "forward"}, "one side of the turn"
    assert {chunk for phase, chunk in seen if phase == "forward"} == set(range(len(plan.layout.chunks)))


def test_at_most_the_planned_number_of_copies_is_under_way(captured):
    program, plan = captured
    run_passes(program, plan, PIPELINE)
    under_way, settling = 0, 0
    for node in program.computes:
        under_way += (node.target is FETCH) - (node.target is WAIT)
        settling += (node.target is REDUCE) - (node.target is ACCUMULATE_GRAD)
        assert 0 <= under_way <= max(plan.prefetch, 1) and 0 <= settling <= 1
    assert under_way == settling == 0


def test_every_gradient_leaves_once(captured):
    program, plan = captured
    captured_gradients = set(program.results_of("gradient"))
    run_passes(program, plan, PIPELINE)
    first = dict(plan.layout.tied)
    slots = [(chunk, slot) for node in program.calls(REDUCE) for _, chunk, slots in [node.args] for slot in slots]
    names = [plan.layout.chunks[chunk].slots[slot].name for chunk, slot in slots]
    assert len(names) == len(set(names))
    assert set(names) == {first.get(name, name) for name in captured_gradients if not name.startswith("input:")}


def test_evaluation_has_no_backward(evaluation):
    program, plan = evaluation
    run_passes(program, plan, PIPELINE)
    assert {note(node).phase for node in program.computes} == {"forward"}
    assert program.calls(TURN) == [] and program.calls(REDUCE) == []
    assert len(program.calls(FETCH)) == len(program.calls(RELEASE)) == len(plan.layout.chunks)
    assert program.inputs("parameter") == {} and program.results_of("output")


def test_equal_blocks_share_their_functions(stack):
    program = stack.program.copy()
    run_passes(program, stack.plan, PIPELINE)
    calls = [node.target for node in program.computes if node.op == "call_module"]
    assert calls and set(calls) == set(program.functions)
    assert all(calls.count(name) > 1 for name in calls)
    phases = {note(node).phase for function in program.functions.values() for node in function.computes}
    assert phases == {"forward", "backward"}


# -- numbers -----------------------------------------------------------------------------------------------


class _Machine:
    """The instructions as plainly as they can be had; what may not be read is made unreadable."""

    def __init__(self, layout, values):
        self.layout, self.values, self.gradients_of = layout, values, {}

    def __getattr__(self, name):
        return getattr(torch.ops.geminifx, name)  # compute, such as attention

    def fetch(self, chunk, numel, dtype):
        flat = torch.full((numel,), float("nan"), dtype=dtype)
        for slot in self.layout.chunks[chunk].slots:
            parameter_view(flat, slot.offset, slot.shape).copy_(self.values[f"parameter:{slot.name}"])
        return flat

    def wait(self, fetched, chunk):
        return fetched

    view = staticmethod(parameter_view)

    def release(self, weights, chunk):
        weights.fill_(float("nan"))

    def gradients(self, numel, dtype):
        return torch.full((numel,), float("nan"), dtype=dtype)

    def put(self, gradients, offset, gradient):
        parameter_view(gradients, offset, gradient.shape).copy_(gradient)

    def put_mm(self, gradients, offset, left, right):
        self.put(gradients, offset, left @ right)

    def put_sum(self, gradients, offset, terms, dims):
        self.put(gradients, offset, terms.sum(dims))

    def reduce(self, gradients, chunk, slots):
        for slot in (self.layout.chunks[chunk].slots[i] for i in slots):
            name = f"gradient:{slot.name}"
            assert name not in self.gradients_of
            self.gradients_of[name] = parameter_view(gradients, slot.offset, slot.shape).clone()

    def accumulate_grad(self, gradients, chunk, slots):
        gradients.fill_(float("nan"))

    def offload(self, value):
        return value.clone()

    def depart(self, value, host):
        assert torch.equal(value, host)
        value.zero_()

    def reload(self, host):
        return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype)

    def arrive(self, reloaded, host):
        return reloaded.copy_(host)

    def save_rng(self, like):
        return torch.get_rng_state()

    def swap_rng(self, state):
        current = torch.get_rng_state()
        torch.set_rng_state(state)
        state.copy_(current)


def _run(program, example):
    """All results of a program by role, buffers after the run included, whichever passes it went through."""
    machine = _Machine(example.plan.layout, example.values)
    world = {"torch": torch, "aten": torch.ops.aten, "geminifx": machine, "DEVICE": torch.device("cpu")}
    world |= {"inf": float("inf"), "nan": float("nan")}
    exec(print_program(program, executable=True), world)
    arguments = example.arguments(program)
    torch.manual_seed(1)
    with torch.no_grad():
        result = world[program.name](*arguments)
        outputs = []
        if program.calls(TURN):
            (turn,) = program.calls(TURN)
            outputs = next(result)[0]
            torch.rand(3)  # the caller may draw between forward and backward
            with pytest.raises(StopIteration) as stop:
                result.send([example.values[f"tangent:{i}"] for i in turn.args[1]])
            result = stop.value.value
    roles = [note(node).role for node in program.placeholders]
    written = {role.replace("buffer", "mutation"): value for role, value in zip(roles, arguments, strict=True)}
    return {**written, **{f"output:{i}": v for i, v in enumerate(outputs)}, **result, **machine.gradients_of}


def _check_numbers(example, plan, counts):
    """They are the captured program's, bit for bit, after so many passes. Returns the last program."""
    captured, tied = example.program, dict(plan.layout.tied)
    expected = _run(captured, example)
    for other, owner in tied.items():
        expected[f"gradient:{owner}"] = expected[f"gradient:{owner}"] + expected.pop(f"gradient:{other}")
    for count in counts:
        program = captured.copy()
        run_passes(program, plan, PIPELINE[:count])
        found = _run(program, example)
        for role in captured.results:
            if role.removeprefix("gradient:") not in tied:
                assert torch.equal(found[role], expected[role]), f"{role} after {PIPELINE[count - 1].name}"
    return program


def test_numbers_are_the_same_bit_for_bit_after_every_pass(example):
    _check_numbers(example, example.plan, range(1, len(PIPELINE) + 1))


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("recomputes", [True, False], ids=["recomputed", "kept"])
def test_numbers_are_the_same_where_activations_are_offloaded(example, recomputes, prefetch, monkeypatch):
    monkeypatch.setattr("geminifx.passes.offload.SMALLEST_BYTES", 1)
    recompute = example.blocks if recomputes else ()
    plan = replace(example.plan, recompute=recompute, offload=example.blocks, prefetch=prefetch)
    program = _check_numbers(example, plan, [len(PIPELINE)])
    several = len(plan.layout.chunks) > 2 + 2 * prefetch
    parts = [program, *program.functions.values()]
    assert any(part.calls(OFFLOAD) for part in parts) or not several
