"""Liveness, byte by byte, on programs small enough to count by hand."""

import numpy as np
from geminifx.compiler.planner.liveness import ACTIVATIONS, GRADIENT_BUFFERS, OUTPUTS, Interval, analyse
from geminifx.passes.program.text import parse_program

# One linear layer of 64 bytes in a chunk of 256, trained on a batch of 128.
STEP = """
def training(
    x: "f32[8, 4] | input:0",
):
    # forward: 0
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    weight: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    t: "f32[4, 4]{1, 4}" = aten.t.default(weight)
    mm: "f32[8, 4]" = aten.mm.default(x, t)
    geminifx.release(wait, 0)
    # forward
    turn: "(f32[8, 4])" = yield [mm], [0]
    # backward
    tangent: "f32[8, 4]" = turn[0]
    # backward: 0
    t_1: "f32[4, 8]{1, 4}" = aten.t.default(tangent)
    mm_1: "f32[4, 4]" = aten.mm.default(t_1, x)
    gradients: "f32[64] | chunk=0" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients, 0, mm_1)
    geminifx.reduce(gradients, 0, [0])
    geminifx.accumulate_grad(gradients, 0, [0])
    return {}
"""


def expected(length: int, *spans: tuple[int, int, int]) -> list[int]:
    """Bytes by position, from (bytes, first, last)."""
    total = np.zeros(length, dtype=int)
    for num_bytes, first, last in spans:
        total[first : last + 1] += num_bytes
    return total.tolist()


def test_one_training_step() -> None:
    program = parse_program(STEP)
    names = [node.name for node in program.nodes]
    at = {name: i for i, name in enumerate(names)}
    live = analyse(program)
    end = len(names) - 1
    assert live.length == len(names) == 16
    assert live.static_bytes == 128
    assert live.largest_bytes == 256, "the gradient's; fetched weights are counted apart"
    assert live.fetches == (Interval(0, at["fetch"], at["release"]),)
    # The product is handed out at the turn; that of the step before lives until then.
    assert live.values[OUTPUTS].tolist() == expected(16, (128, at["mm"], end), (128, 0, at["turn"]))
    # The tangent dies with its view's last reader, the weight's gradient with `put`.
    assert live.values[ACTIVATIONS].tolist() == expected(16, (128, at["turn"], at["mm_1"]), (64, at["mm_1"], at["put"]))
    assert live.values[GRADIENT_BUFFERS].tolist() == expected(16, (256, at["gradients"], at["accumulate_grad"]))
    assert live.total().tolist() == sum(np.array(array) for array in live.values.values()).tolist()


def test_a_product_that_is_computed_in_its_place_takes_no_memory_of_its_own() -> None:
    apart = STEP[STEP.index("    mm_1") : STEP.index("    geminifx.reduce")]
    at_once = apart[apart.index("    gradients") :].replace("put(gradients, 0, mm_1)", "put_mm(gradients, 0, t_1, x)")
    program = parse_program(STEP.replace(apart, at_once))
    at = {node.name: i for i, node in enumerate(program.nodes)}
    live = analyse(program)
    assert live.values[ACTIVATIONS].tolist() == expected(15, (128, at["turn"], at["put_mm"]))
    assert live.values[GRADIENT_BUFFERS].tolist() == expected(15, (256, at["gradients"], at["accumulate_grad"]))


def activations(body: str, results: str) -> list[int]:
    header = 'def evaluation(\n    x: "f32[4, 4] | input:0",\n):\n    # forward\n'
    live = analyse(parse_program(f"{header}{body}    return {{{results}}}\n"))
    return live.values[ACTIVATIONS].tolist()


def test_views_keep_a_storage_and_cost_nothing() -> None:
    body = (
        '    exp: "f32[4, 4]" = aten.exp.default(x)\n'
        '    view: "f32[16]" = aten.view.default(exp, [16])\n'
        '    slice_1: "f32[2]" = aten.slice.Tensor(view, 0, 0, 2)\n'
        '    relu: "f32[4, 4]" = aten.relu.default(x)\n'
        '    sum_1: "f32[]" = aten.sum.default(slice_1)\n'
        '    cos: "f32[]" = aten.cos.default(sum_1)\n'
    )
    # x, exp, view, slice, relu (64 bytes that nobody reads), sum, cos (handed out), return
    assert activations(body, '"output:0": cos') == [0, 64, 64, 64, 128, 68, 4, 0]


def test_views_of_inputs_are_not_counted_again() -> None:
    body = '    t: "f32[4, 4]{1, 4}" = aten.t.default(x)\n    exp: "f32[4, 4]{1, 4}" = aten.exp.default(t)\n'
    assert activations(body, '"output:0": exp') == [0, 0, 0, 0]


def test_the_largest_storage_is_one_of_the_programs_own_however_many_names_it_has() -> None:
    header = 'def evaluation(\n    x: "f32[4, 4] | input:0",\n):\n    # forward\n'
    body = (
        '    sum_1: "f32[4]" = aten.sum.dim_IntList(x, [0])\n'
        '    view: "f32[2, 2]" = aten.view.default(sum_1, [2, 2])\n'
        '    cos: "f32[2, 2]" = aten.cos.default(view)\n'
    )
    program = parse_program(header + body + '    return {"output:0": cos}\n')
    assert analyse(program).largest_bytes == 16, "not the input's 64"


def test_each_of_several_results_has_its_own_life() -> None:
    body = (
        '    sort: "(f32[4, 4], i64[4, 4])" = aten.sort.default(x)\n'
        '    values: "f32[4, 4]" = sort[0]\n'
        '    order: "i64[4, 4]" = sort[1]\n'
        '    exp: "f32[4, 4]" = aten.exp.default(values)\n'
        '    neg: "i64[4, 4]" = aten.neg.default(order)\n'
        '    cos: "f32[4, 4]" = aten.cos.default(exp)\n'
    )
    # Values (64) until exp, order (128) until neg, neg itself; exp until cos.
    assert activations(body, '"output:0": cos') == [0, 192, 192, 192, 64 + 128 + 64, 128 + 128 + 64, 64, 0]


def test_pieces_of_a_split_share_what_was_split() -> None:
    body = (
        '    exp: "f32[4, 4]" = aten.exp.default(x)\n'
        '    split: "(f32[2, 4], f32[2, 4])" = aten.split.Tensor(exp, 2)\n'
        '    first: "f32[2, 4]" = split[0]\n'
        '    second: "f32[2, 4]" = split[1]\n'
        '    cos: "f32[2, 4]" = aten.cos.default(first)\n'
        '    add: "f32[2, 4]" = aten.add.Tensor(cos, second)\n'
    )
    assert activations(body, '"output:0": add') == [0, 64, 64, 64, 64, 64 + 32, 64 + 32, 0]


def test_an_evaluations_results_are_held_through_the_next_one() -> None:
    header = 'def evaluation(\n    x: "f32[4, 4] | input:0",\n):\n    # forward\n'
    body = '    exp: "f32[4, 4]" = aten.exp.default(x)\n    return {"output:0": exp}\n'
    assert analyse(parse_program(header + body)).values[OUTPUTS].tolist() == [64, 128, 128]


def test_what_a_collective_fills_and_sends_lives_until_it_is_waited_for() -> None:
    body = (
        '    exp: "f32[4, 4]" = aten.exp.default(x)\n'
        "    start: \"f32[8, 4]\" = geminifx.start_all_gather(exp, 'tp', 2)\n"
        '    cos: "f32[4, 4]" = aten.cos.default(x)\n'
        '    whole: "f32[8, 4]" = geminifx.finish_collective(start, exp)\n'
        "    sums: \"f32[4, 4]\" = geminifx.start_all_reduce(cos, 'tp', 'sum')\n"
        '    tan: "f32[8, 4]" = aten.tan.default(whole)\n'
        '    summed: "f32[4, 4]" = geminifx.finish_collective(sums)\n'
    )
    # exp (64), what it is gathered into (128), cos (64), which its sum overwrites, tan (128).
    live = [0, 64, 64 + 128, 64 + 128 + 64, 64 + 128 + 64, 128 + 64, 128 + 64 + 128, 64, 0]
    assert activations(body, '"output:0": x') == live


def test_what_is_offloaded_is_on_the_host_from_its_departure_to_its_arrival() -> None:
    program = parse_program("""
def training(
    x: "f32[16] | input:0",
):
    # forward
    y: "f32[16]" = aten.exp.default(x)
    y_host: "f32[16]" = geminifx.offload(y)
    z: "f32[16]" = aten.exp.default(x)
    z_host: "f32[16]" = geminifx.offload(z)
    geminifx.depart(y, y_host)
    geminifx.depart(z, z_host)
    out: "f32[16]" = aten.exp.default(x)
    turn: "(f32[16])" = yield [out], [0]
    # backward
    tangent: "f32[16]" = turn[0]
    reload: "f32[16]" = geminifx.reload(z_host)
    z_1: "f32[16]" = geminifx.arrive(reload, z_host)
    mul: "f32[16]" = aten.mul.Tensor(tangent, z_1)
    reload_1: "f32[16]" = geminifx.reload(y_host)
    y_1: "f32[16]" = geminifx.arrive(reload_1, y_host)
    mul_1: "f32[16]" = aten.mul.Tensor(mul, y_1)
    return {"gradient:input:0": mul_1}
""")
    at = {node.name: i for i, node in enumerate(program.nodes)}
    live = analyse(program)
    assert live.offloaded_bytes == 2 * 64, "both, at the turn"
    on_device = [
        (64, at["y"], at["depart"]), (64, at["z"], at["depart_1"]), (64, at["turn"], at["mul"]),
        (64, at["reload"], at["mul"]), (64, at["mul"], at["mul_1"]), (64, at["reload_1"], at["mul_1"]),
    ]  # fmt: skip
    assert live.values[ACTIVATIONS].tolist() == expected(live.length, *on_device)
