"""What single operators take on the device, by hand, on a machine whose figures are easy to divide by."""

from dataclasses import replace

import pytest
import torch
from geminifx.compiler.planner.costs import (
    FREE,
    MOVED,
    PRODUCT_SHARES,
    SCATTERED,
    SLOWNESS,
    UNALIGNED_SHARE,
    WIDENING,
    flops,
    is_free,
    kernel_s,
    num_bytes,
    operators,
    product_share,
    weighed_bytes,
)
from geminifx.compiler.rates.rates import ARENA, Products
from geminifx.passes.program.program import Program
from geminifx.passes.program.text import parse_program
from geminifx.runtime.isa.instructions import INSTRUCTIONS, PUT_SUM
from torch import fx

RATES = replace(
    ARENA, bf16=Products.of_any_size(1e12), fp16=Products.of_any_size(2e12), fp32=Products.of_any_size(1e11),
    memory_bytes_per_s=1e9, kernel_s=1e-6,
)  # fmt: skip

INPUTS = """
    f: "f32[64, 32] | input:0", b: "bf16[64, 32] | input:1", w: "bf16[32, 128] | input:2", v: "f32[32, 128] | input:3",
    t: "f32[1000, 32] | input:4", i: "i64[10] | input:5", g: "bf16[9000] | input:6", s: "f32[] | input:7",
"""


def the_last_of(*lines: str) -> fx.Node:
    """The node of the last of these lines."""
    body = "\n".join(f"    {line}" for line in lines)
    inputs = "\n".join(f"    {line.strip()}," for line in INPUTS.replace('",', '"\n').split("\n") if line.strip())
    return parse_program(f"def evaluation(\n{inputs}\n):\n    # forward\n{body}\n    return {{}}\n").computes[-1]


@pytest.mark.parametrize(
    "line, flop, moved",
    [
        ('y: "f32[64, 32]" = aten.exp.default(f)', 0, 2 * 64 * 32 * 4),
        ('y: "f32[64, 32]" = aten.add.Tensor(f, b)', 0, 64 * 32 * (4 + 2 + 4)),
        ('y: "f32[64, 32]" = aten.mul.Tensor(f, f)', 0, 64 * 32 * (4 + 4)),
        ('y: "f32[64]" = aten.sum.dim_IntList(f, [1])', 0, 64 * 32 * 4 + 64 * 4),
        ('y: "bf16[64, 32]" = aten._to_copy.default(f, dtype=torch.bfloat16)', 0, 64 * 32 * (4 + 2)),
        ('y: "bf16[64, 128]" = aten.mm.default(b, w)', 2 * 64 * 32 * 128, 2 * (64 * 32 + 32 * 128 + 64 * 128)),
        ('y: "f32[64, 128]" = aten.mm.default(f, v)', 2 * 64 * 32 * 128, 4 * (64 * 32 + 32 * 128 + 64 * 128)),
        ('y: "f32[10, 32]" = aten.embedding.default(t, i)', 0, 2 * 10 * 32 * 4 + 10 * 8),
        ('y: "f32[10, 32]" = aten.index_select.default(t, 0, i)', 0, 2 * 10 * 32 * 4 + 10 * 8),
        ('y: "f32[64, 32]" = aten.add_.Tensor(f, s)', 0, 64 * 32 * 8 + 4),
        ('geminifx.put(g, 100, b)', 0, 2 * 64 * 32 * 2),
        ('geminifx.put_mm(g, 0, b, w)', 2 * 64 * 32 * 128, 2 * (64 * 32 + 32 * 128 + 64 * 128)),
        ('y: "bf16[4096]" = geminifx.gradients(4096, torch.bfloat16)', 0, 0),
    ],
)  # fmt: skip
def test_flop_and_bytes_of_one_operator(line: str, flop: int, moved: int) -> None:
    node = the_last_of(line)
    assert (flops(node), num_bytes(node)) == (flop, moved)


def test_elements_count_that_are_read_not_those_between_them_nor_twice_where_they_are_repeated() -> None:
    columns = 'c: "f32[64, 8]{32, 1}" = aten.slice.Tensor(f, 1, 0, 8)'
    assert num_bytes(the_last_of(columns, 'y: "f32[64, 8]" = aten.exp.default(c)')) == 2 * 64 * 8 * 4
    repeated = 'r: "f32[64, 32]{0, 0}" = aten.expand.default(s, [64, 32])'
    added = the_last_of(repeated, 'y: "f32[64, 32]" = aten.add.Tensor(f, r)')
    assert num_bytes(added) == 2 * 64 * 32 * 4 + 4


def test_logits_in_pieces_pass_through_memory() -> None:
    text = 'def evaluation(\n    h: "bf16[64, 32] | input:0",\n    w: "bf16[128, 32] | input:1",\n'
    program = parse_program(text + '    l: "i64[64] | input:2",\n):\n    # forward\n    return {}\n')
    hidden, weight, labels = program.placeholders
    arguments = (hidden, weight, None, labels, 1.0, 0.0, -100, 1, 64)
    node = program.emit(torch.ops.geminifx.linear_cross_entropy.default, arguments, before=program.output)
    operands, results = 2 * 32 * (64 + 128) + 8 * 64, 4 + 4 + 2 * 64 * 4
    assert num_bytes(node) == operands + results + 64 * 128 * (2 * 2 + 4 * 4)
    slowness = SLOWNESS[node.target]
    assert kernel_s(node, RATES) == pytest.approx(1e-6 + slowness * num_bytes(node) / 1e9 + flops(node) / 1e12)


@pytest.mark.parametrize(
    "line, seconds",
    [
        ('y: "bf16[64, 128]" = aten.mm.default(b, w)', 28672e-9),  # bytes: 2 * 64 * 32 * 128 at 1e12 are quicker
        ('y: "f32[64, 128]" = aten.mm.default(f, v)', 57344e-9),
        ('y: "f32[64, 32]" = aten.exp.default(f)', 16384e-9),
    ],
)
def test_the_slower_of_flop_and_bytes_counts_and_what_every_kernel_takes(line: str, seconds: float) -> None:
    node = the_last_of(line)
    assert kernel_s(node, RATES) == pytest.approx(1e-6 + seconds)
    fast_memory = replace(RATES, memory_bytes_per_s=1e18)
    rate = 1e12 if "bf16" in line else 1e11
    assert kernel_s(node, fast_memory) == pytest.approx(1e-6 + flops(node) / rate)


def test_attention_does_not_reach_the_rate_of_products() -> None:
    operator = torch.ops.geminifx.attention.default
    text = 'def evaluation(\n    q: "bf16[2, 4, 16, 8] | input:0",\n):\n    # forward\n    return {}\n'
    program = parse_program(text)
    (q,) = program.placeholders
    node = program.emit(operator, (q, q, q, None, 1.0, False, 0.0, 0), before=program.output)
    assert flops(node) == 2 * 2 * 4 * 16 * 16 * (8 + 8)
    fast_memory = replace(RATES, memory_bytes_per_s=1e18)
    share = PRODUCT_SHARES[operator]
    assert share < 1 and kernel_s(node, fast_memory) == pytest.approx(1e-6 + flops(node) / share / 1e12)


@pytest.mark.parametrize(
    "lines, slowness",
    [
        (('y: "f32[64, 32]" = aten.add.Tensor(f, b)',), 1.0),
        (('y: "f32[64, 32]" = aten.mul.Tensor(f, s)',), 1.0),
        (('r: "f32[64, 1]{32, 1}" = aten.slice.Tensor(f, 1, 0, 1)', 'y: "f32[64, 32]" = aten.mul.Tensor(f, r)'),
         SCATTERED),
        (('c: "f32[64, 16]{32, 1}" = aten.slice.Tensor(f, 1, 0, 16)', 'y: "f32[64, 16]" = aten.neg.default(c)'),
         SCATTERED),
        (('c: "f32[64, 16]{32, 1}" = aten.slice.Tensor(f, 1, 0, 16)', 'y: "f32[64, 16]" = aten.clone.default(c)'),
         SCATTERED),
        (('c: "f32[64, 16]{32, 1}" = aten.slice.Tensor(f, 1, 0, 16)', 'y: "f32[64, 32]" = aten.cat.default([c, c], 1)'),
         SCATTERED),
        (('y: "f32[64, 64]" = aten.cat.default([f, f], 1)',), 1.0),
        (('v: "f32[1, 64, 32]" = aten.view.default(f, [1, 64, 32])', 'y: "f32[1, 64, 32]" = aten.add.Tensor(v, f)'),
         1.0),
        (('y: "f32[64, 32]" = aten._to_copy.default(b, dtype=torch.float32)',), WIDENING),
        (('y: "bf16[64, 32]" = aten._to_copy.default(f, dtype=torch.bfloat16)',), 1.0),
        (('y: "f32[64]" = aten.sum.dim_IntList(f, [1])',), 1.0),
        (('geminifx.put_sum(g, 0, b, [0])',), SLOWNESS[PUT_SUM]),
    ],
)  # fmt: skip
def test_what_has_no_vectorized_kernel_takes_longer_than_its_bytes(lines: tuple[str, ...], slowness: float) -> None:
    node = the_last_of(*lines)
    assert weighed_bytes(node) == pytest.approx(slowness * num_bytes(node))


@pytest.mark.parametrize(
    "columns, dtype, share",
    [(128, "bf16", 1.0), (136, "bf16", 1.0), (129, "bf16", UNALIGNED_SHARE), (129, "f32", 1.0)],
)
def test_rows_that_begin_at_odd_addresses_slow_products_of_16_bits_down(columns: int, dtype: str, share: float) -> None:
    text = f'def evaluation(\n    h: "{dtype}[64, 32] | input:0",\n    w: "{dtype}[32, {columns}] | input:1",\n):\n'
    line = f'    y: "{dtype}[64, {columns}]" = aten.mm.default(h, w)\n'
    node = parse_program(f"{text}    # forward\n{line}    return {{}}\n").computes[-1]
    assert product_share(node) == share


@pytest.mark.parametrize(
    "lines",
    [
        ('y: "f32[32, 64]{1, 32}" = aten.permute.default(f, [1, 0])',),
        ('y: "f32[2048]" = aten.view.default(f, [2048])',),
        ('y: "f32[2048]" = aten._unsafe_view.default(f, [2048])',),
        ('y: "(f32[32, 32], f32[32, 32])" = aten.split.Tensor(f, 32)', 'z: "f32[32, 32]" = y[0]'),
        ('c: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)',),
    ],
    ids=["permute", "view", "unsafe view", "element", "instruction"],
)
def test_views_and_what_only_says_what_is_to_happen_are_free(lines: tuple[str, ...]) -> None:
    assert is_free(the_last_of(*lines))


def test_everything_else_is_not() -> None:
    assert not is_free(the_last_of('y: "f32[64, 32]" = aten.clone.default(f)'))
    assert not is_free(the_last_of('y: "f32[64, 32]" = aten.add_.Tensor(f, s)'))


def test_every_instruction_has_a_cost_or_is_free() -> None:
    named = {str(target).split(".")[1] for target in (*FREE, *MOVED) if str(target).startswith("geminifx.")}
    assert INSTRUCTIONS - named == {"share"}, "which computes, as any operator does"


def test_a_function_costs_what_its_body_does_at_each_call() -> None:
    def body(program: Program) -> list[str]:
        return [str(node.target) for node in operators(program)]

    inner, outer = (fx.Graph() for _ in range(2))
    x = inner.placeholder("x")
    inner.output([inner.call_function(torch.ops.aten.exp.default, (x,))])
    y = outer.placeholder("y")
    outer.create_node("call_module", "shared", (y,), {})
    outer.create_node("call_module", "shared", (y,), {})
    program = Program("evaluation", outer, functions={"shared": Program("shared", inner)})
    assert body(program) == ["aten.exp.default"] * 2
