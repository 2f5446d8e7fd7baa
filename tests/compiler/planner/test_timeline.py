"""A program as the clock reads it: launches ahead of the device, exchanges that are set under way and waited for."""

from dataclasses import replace

import geminifx
import pytest
from geminifx.compiler.planner.costs import SCATTERED, is_free, kernel_s
from geminifx.compiler.planner.timeline import FOLLOWED, Carrier, Timeline, Transfer, timeline
from geminifx.compiler.rates.rates import ARENA, Products, Rates
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.text import parse_program
from geminifx.runtime.isa.instructions import ACCUMULATE_GRAD, AVERAGE, FETCH, FINISH_COLLECTIVE, REDUCE, STARTS, WAIT
from geminifx.runtime.isa.mesh import Axis, Mesh
from zoo import opt, tokens

RATES = replace(ARENA, fp32=Products.of_any_size(1e9), memory_bytes_per_s=1e12, kernel_s=0.0, launch_s=0.0)


def read(*lines: str, plan: Plan | None = None, **changes: float) -> Timeline:
    body = "\n".join(f"    {line}" for line in lines)
    text = f'def evaluation(\n    x: "f32[1000, 500] | input:0",\n):\n    # forward\n{body}\n    return {{}}\n'
    return timeline(parse_program(text), plan or Plan(), replace(RATES, **changes))


MM = [f'y{i}: "f32[1000, 1000]" = aten.mm.default(x, t)' for i in range(3)]  # a second each
VIEW = 't: "f32[500, 1000]{1, 500}" = aten.permute.default(x, [1, 0])'
SMALL = [f'z{i}: "f32[1000, 500]" = aten.exp.default(x)' for i in range(4)]  # four microseconds each


def test_operators_follow_one_another() -> None:
    found = read(VIEW, *MM)
    assert found.compute_s == found.busy_s == pytest.approx(3.0)
    assert found.launching_s == 0 and found.instructions == []


def test_launches_hide_behind_what_the_device_still_has_to_do() -> None:
    found = read(VIEW, MM[0], *SMALL, launch_s=0.1)
    assert found.launching_s == pytest.approx(0.5), "a view launches nothing"
    assert found.compute_s == pytest.approx(0.1 + 1.0 + 4 * 4e-6), "only the first one is waited for"
    assert found.busy_s == pytest.approx(1.0 + 4 * 4e-6)


def test_a_device_that_has_nothing_to_do_waits_for_launches() -> None:
    found = read(*SMALL, VIEW, MM[0], launch_s=0.1)
    assert found.compute_s == pytest.approx(5 * 0.1 + 1.0)
    assert found.busy_s == pytest.approx(1.0 + 4 * 4e-6)


def test_an_attention_and_an_update_take_the_launching_thread_longer_than_other_operators() -> None:
    heads = 'h: "f32[1, 10, 1000, 50]" = aten.view.default(x, [1, 10, 1000, 50])'
    types = "(f32[1, 10, 1000, 50]{500000, 50, 500, 1}, f32[1, 10, 1000], u8[0])"
    attention = f'a: "{types}" = geminifx.attention(h, h, h, None, 1.0, True, 0.0, 0)'
    reduce = ['g: "f32[100]" = geminifx.gradients(100, torch.float32)', "geminifx.reduce(g, 0, [0])"]
    few, some = read(SMALL[0], launch_s=0.1), read(SMALL[0], heads, attention, launch_s=0.1)
    assert few.launching_s == pytest.approx(0.1) and some.launching_s == pytest.approx(0.1 * (1 + 5))
    assert read(*reduce, launch_s=0.1).launching_s == pytest.approx(0.1 * (1 + 9)), "zeros, and the update"


def test_equal_operators_of_other_types_cost_what_their_types_do() -> None:
    smaller = 's: "f32[1000, 250]{500, 1}" = aten.slice.Tensor(x, 1, 0, 250)'
    found = read(SMALL[0], smaller, 'e: "f32[1000, 250]" = aten.exp.default(s)')
    assert found.busy_s == pytest.approx((2 * 2e6 + SCATTERED * 2 * 1e6) / 1e12), "of a part of each row"


MESH = Mesh((Axis("col", 4, "tensor"),))
EXCHANGE = [
    'p: "f32[1000, 500]" = geminifx.start_all_reduce(x, "col", "sum")',
    'w: "f32[1000, 500]" = geminifx.finish_collective(p)',
]


def test_an_exchange_is_set_under_way_and_waited_for() -> None:
    found = read(EXCHANGE[0], VIEW, MM[0], EXCHANGE[1], plan=Plan(mesh=MESH))
    (begin_s, begins, what), (end_s, ends, number) = found.timed
    assert begins in STARTS and ends is FINISH_COLLECTIVE and (begin_s, end_s) == (0, pytest.approx(1.0))
    assert what == Transfer(number, Carrier.NETWORK, 2 * 4 * 1000 * 500 * 3 // 4)  # type: ignore[arg-type]
    launched = read(EXCHANGE[0], VIEW, MM[0], EXCHANGE[1], plan=Plan(mesh=MESH), launch_s=0.1)
    assert launched.launching_s == pytest.approx(0.3), "both instructions and the product"


def test_every_instruction_of_a_parallel_program_is_followed() -> None:
    compiled = geminifx.compile(opt(), world_size=4, parallel={"data": 2, "tensor": {"mode": "1d", "size": 2}},
                                example_inputs=tokens(batch=2))  # fmt: skip
    program = compiled.session.last["training"].flat
    found = timeline(program, compiled.plan, RATES)
    targets = [target for _, target, _ in found.instructions]
    assert {FETCH, WAIT, REDUCE, ACCUMULATE_GRAD, FINISH_COLLECTIVE, AVERAGE} <= set(targets) <= set(FOLLOWED)
    begun = [what.number for _, _, what in found.instructions if isinstance(what, Transfer)]
    ended = [what for _, target, what in found.instructions if target is FINISH_COLLECTIVE]
    assert len(set(begun)) == len(begun) and set(ended) <= set(begun)
    received = {e.collective: e for e in compiled.plan.estimate.collectives if e.axis == "tp"}
    assert sum(e.count for e in received.values()) == len(ended)


def test_reading_a_program_twice_or_operator_by_operator_is_the_same() -> None:
    compiled = geminifx.compile(opt(), example_inputs=tokens())
    program = compiled.session.last["training"].flat
    rates: Rates = replace(RATES, kernel_s=1e-6)
    expected = sum(kernel_s(node, rates) for node in program.computes if not is_free(node))
    found = timeline(program, compiled.plan, rates)
    assert found.busy_s == pytest.approx(expected) and found == timeline(program, compiled.plan, rates)
