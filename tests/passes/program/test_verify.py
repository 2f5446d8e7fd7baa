"""The verifier, by mutation: a good program is damaged in one place, and the message says which and why."""

import re

import pytest
import torch
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import annotate
from geminifx.passes.program.text import parse_program
from geminifx.passes.program.types import parse_type
from geminifx.passes.program.verify import canonical, chunked, offloaded, overlapped, released, turned, verify
from geminifx.runtime.isa import instructions as ops
from geminifx.runtime.isa.errors import VerificationError
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot

aten = torch.ops.aten
FACTS = (canonical, turned, chunked, released)
END = "reduce, accumulate_grad"

GOOD = """
def training(x: "f32[4, 4] | input:0"):
    # forward: fc
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    y: "f32[4, 4]" = aten.mm.default(x, t)
    geminifx.release(wait, 0)
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward: fc
    tangent: "f32[4, 4]" = turn[0]
    fetch_1: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait_1: "f32[64] | chunk=0" = geminifx.wait(fetch_1, 0)
    w_1: "f32[4, 4] | chunk=0" = geminifx.view(wait_1, 0, [4, 4])
    dx: "f32[4, 4]" = aten.mm.default(tangent, w_1)
    geminifx.release(wait_1, 0)
    dw: "f32[4, 4]" = aten.mm.default(tangent, x)
    gradients: "f32[64] | chunk=0" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients, 0, dw)
    geminifx.reduce(gradients, 0, [0])
    geminifx.accumulate_grad(gradients, 0, [0])
    return {"gradient:input:0": dx}
"""


def _erase(name):
    return lambda program, node: program.graph.erase_node(node[name])


def _move(name, *, after):
    return lambda program, node: node[after].append(node[name])


def _emit(target, *args, before):
    def damage(program, node):
        values = tuple(node.get(arg, arg) if isinstance(arg, str) else arg for arg in args)
        program.emit(target, values, before=node[before])

    return damage


def _arguments(name, *args):
    def damage(program, node):
        node[name].args = tuple(node.get(arg, arg) if isinstance(arg, str) else arg for arg in args)

    return damage


def _note(name, **changes):
    return lambda program, node: annotate(node[name], **changes)


def _input(role="", tied=""):
    return lambda program, node: program.add_input("w_0", parse_type("f32[4, 4]"), role, tied)


def _named(name, new):
    def damage(program, node):
        node[name].name = new

    return damage


def _untyped(program, node):
    with program.graph.inserting_before(node["y"]):
        program.graph.call_function(aten.relu.default, (node["x"],))


def _outside(program, node):
    product = (node["gradients"], 0, node["tangent"], node["x"])
    program.emit(ops.PUT_MM, product, before=node["reduce"]).update_arg(1, 64)


# What is done to GOOD -> the node that is named, what was found, what is expected.
DAMAGES = {
    "a release is dropped": (_erase("release"), "wait", "0 releases", "exactly one release"),
    "a chunk is released twice": (
        _emit(ops.RELEASE, "wait", 0, before="turn"), "wait", "2 releases", "exactly one release",
    ),
    "a view of a chunk is read after its release": (
        _move("release", after="w"), "y", "reads wait after its release", "the release after the last reader",
    ),
    "two operators are swapped": (_move("t", after="y"), "y", "reads t, which is made later", "made earlier"),
    "an instruction is swapped with its argument": (
        _move("fetch", after="wait"), "wait", "reads fetch, which is made later", "made earlier",
    ),
    "a type is annotated wrongly": (
        _note("y", type=parse_type("f32[2, 8]")), "y", r"annotated f32\[2, 8\]", r"f32\[4, 4\], as inferred",
    ),
    "strides are annotated wrongly": (
        _note("t", type=parse_type("f32[4, 4]")), "t", r"annotated f32\[4, 4\]", r"f32\[4, 4\]\{1, 4\}, as inferred",
    ),
    "an operator gets arguments that it does not take": (
        _arguments("y", "x", "wait"), "y", "Error: .*", "arguments the operator takes",
    ),
    "a value is called by a keyword": (_named("y", "class"), "class", "called 'class'", "a name by"),
    "a value is called by what is code": (
        _named("y", "y: int = exit()"), "y: int = exit()", r"called 'y: int = exit\(\)'", "a name by",
    ),
    "a value hides a name of the text": (_named("y", "aten"), "aten", "called 'aten'", "a name by"),
    "a node is made past emit": (_untyped, "relu_default", "made without a type", "nodes made by Program.emit"),
    "a backward node stands before the turn": (
        _note("t", phase="backward"), "t", "a backward node before the turn", "forward nodes only",
    ),
    "a forward node stands behind the turn": (
        _note("dx", phase="forward"), "dx", "a forward node after the turn", "backward nodes only",
    ),
    "there are two turns": (_emit(ops.TURN, [], [], before="dw"), "turn_1", "a second turn", "one turn"),
    "a gradient is never reduced": (
        _erase("reduce"), "gradients", "used by: geminifx.put, geminifx.accumulate_grad$", f"put.*, {END}",
    ),
    "a gradient is never accumulated": (_erase("accumulate_grad"), "gradients", "gradients used by: .*", END),
    "nothing is put into gradients": (_erase("put"), "gradients", "gradients used by: .*", "put"),
    "a value is put after the reduce": (
        _move("put", after="reduce"), "gradients", "used by: geminifx.reduce.*put.*accumulate_grad", f"put.*, {END}",
    ),
    "a product is put after the reduce": (
        _emit(ops.PUT_MM, "gradients", 0, "tangent", "x", before="accumulate_grad"),
        "gradients", "used by: .*reduce, geminifx.put_mm, geminifx.accumulate_grad$", f"put.*, {END}",
    ),
    "a product is put where there is no room for it": (
        _outside, "put_mm", r"start \(64\) \+ length \(16\) exceeds", "arguments the operator takes",
    ),
    "a chunk is reduced before its release": (
        lambda program, node: node["accumulate_grad"].append(node["release_1"]),
        "release_1", "chunk 0 is reduced before its release", "release, then reduce",
    ),
    "a parameter is an input": (_input("parameter:fc.w"), "w_0", "a parameter as an input", "geminifx.fetch"),
    "a shared parameter has two inputs": (
        _input("input:1", "fc.w"), "w_0", "a second input for fc.w", "one input per shared parameter",
    ),
    "another chunk is waited for": (
        _arguments("wait", "fetch", 1), "wait", "something other than its chunk's fetch", "geminifx.wait",
    ),
    "a fetch is never waited for": (
        _emit(ops.FETCH, 1, 64, torch.float32, before="y"), "fetch_2", "0 readers", "one reader, its wait",
    ),
    "a copy that nothing needs": (
        _emit(aten.lift_fresh_copy.default, "y", before="turn"), "lift_fresh_copy", "the no-op aten.lift_fresh_copy",
        "its argument read directly",
    ),
    "a no-op comes back": (
        _emit(aten.detach.default, "y", before="turn"), "detach", "the no-op aten.detach", "its argument read directly",
    ),
}  # fmt: skip


EXCHANGING = """
def training(x: "f32[4, 4] | input:0", w: "f32[2, 4] | parameter:fc.weight"):
    # forward: fc
    start: "f32[4, 4]" = geminifx.start_all_gather(w, 'tp', 2)
    relu: "f32[4, 4]" = aten.relu.default(x)
    whole: "f32[4, 4]" = geminifx.finish_collective(start, w)
    y: "f32[4, 4]" = aten.mm.default(relu, whole)
    start_1: "f32[4, 4]" = geminifx.start_all_reduce(y, 'tp', 'sum')
    exp: "f32[4, 4]" = aten.exp.default(relu)
    summed: "f32[4, 4]" = geminifx.finish_collective(start_1)
    z: "f32[4, 4]" = aten.add.Tensor(exp, summed)
    turn: "(f32[4, 4])" = yield [z], [0]
    # backward: fc
    tangent: "f32[4, 4]" = turn[0]
    dx: "f32[4, 4]" = aten.mul.Tensor(tangent, exp)
    return {"gradient:input:0": dx}
"""

COLLECTIVE_DAMAGES = {
    "a collective is left in one piece": (
        _emit(ops.ALL_REDUCE, "exp", "tp", "sum", before="z"), "all_reduce", "a collective in one piece", "its start",
    ),
    "a collective is never waited for": (
        _emit(ops.START_REDUCE_SCATTER, "exp", "tp", 2, before="z"), "start_reduce_scatter", "read by nobody",
        "one reader, its finish",
    ),
    "a collective is waited for twice": (
        _emit(ops.FINISH_COLLECTIVE, "start", "w", before="y"),
        "start", "read by whole, finish_collective", "one reader",
    ),
    "what a collective fills is read too early": (
        _emit(aten.relu.default, "start", before="whole"), "start", "read by whole, relu_1", "one reader, its finish",
    ),
    "a collective is waited for before it starts": (
        _move("start", after="whole"), "whole", "reads start, which is made later", "made earlier",
    ),
    "something else is waited for": (
        _emit(ops.FINISH_COLLECTIVE, "exp", before="z"),
        "finish_collective", "waits for exp", "the start of a collective",
    ),
    "a collective crosses the turn": (
        _note("summed", phase="backward"), "summed", "waits for start_1 of the other phase", "before the turn",
    ),
    "what is sent may be freed on its way": (_arguments("whole", "start"), "whole", "keeps nothing", "keeps w"),
    "what a sum overwrites is kept": (_arguments("summed", "start_1", "y"), "summed", "keeps y", "keeps nothing"),
    "what a sum overwrites is read": (
        _emit(aten.relu.default, "y", before="start_1"), "start_1", "overwrites y, which others read", "a copy",
    ),
    "what a sum overwrites is a parameter": (
        _arguments("start_1", "x", "tp", "sum"), "start_1", "overwrites x, which others read", "a copy",
    ),
}  # fmt: skip


OFFLOADING = """
def training(x: "f32[4, 4] | input:0"):
    # forward: fc
    y: "f32[4, 4]" = aten.exp.default(x)
    flat: "f32[16]" = aten.view.default(y, [16])
    host: "f32[4, 4]" = geminifx.offload(y)
    z: "f32[4, 4]" = aten.exp.default(x)
    other: "f32[4, 4]" = geminifx.offload(z)
    geminifx.depart(y, host)
    geminifx.depart(z, other)
    out: "f32[4, 4]" = aten.relu.default(x)
    turn: "(f32[4, 4])" = yield [out], [0]
    # backward: fc
    tangent: "f32[4, 4]" = turn[0]
    reload: "f32[4, 4]" = geminifx.reload(host)
    back: "f32[4, 4]" = geminifx.arrive(reload, host)
    dx: "f32[4, 4]" = aten.mul.Tensor(tangent, back)
    reload_1: "f32[4, 4]" = geminifx.reload(other)
    back_1: "f32[4, 4]" = geminifx.arrive(reload_1, other)
    dz: "f32[4, 4]" = aten.mul.Tensor(dx, back_1)
    return {"gradient:input:0": dz}
"""

OFFLOAD_DAMAGES = {
    "a reload of what was never offloaded": (
        _arguments("reload", "out"), "reload", "reads out", "what geminifx.offload returned",
    ),
    "a wait for something else": (_arguments("back", "x", "host"), "back", "reads x", "what geminifx.reload returned"),
    "a departure of something else": (
        _arguments("depart", "y", "x"), "depart", "reads x", "what geminifx.offload returned",
    ),
    "a value is offloaded twice": (
        _arguments("other", "y"), "other", "offloads y again, as host does", "one offload of a value",
    ),
    "a value is let go that is not offloaded": (
        _arguments("depart", "out", "host"), "depart", "reads out, which is made later", "made earlier",
    ),
    "another value is let go": (_arguments("depart", "x", "host"), "depart", "lets x depart", "y, which is offloaded"),
    "a value never departs": (
        _erase("depart"), "host", r"used by: geminifx\.reload, geminifx\.arrive", "depart, reload, arrive",
    ),
    "a value never comes back": (
        _emit(ops.OFFLOAD, "out", before="turn"), "offload", "used by: nobody", "depart, reload, arrive",
    ),
    "a value is reloaded twice": (
        _emit(ops.RELOAD, "host", before="dx"), "host",
        r"geminifx\.depart, geminifx\.reload, geminifx\.arrive, geminifx\.reload", "depart, reload, arrive",
    ),
    "a value is waited for with another's copy": (
        _arguments("back", "reload_1", "host"), "back", "reads reload_1, which is made later", "made earlier",
    ),
    "a value is read before it has come": (
        _emit(aten.relu.default, "reload", before="back"), "reload", "read by back, relu", "one reader, its arrive",
    ),
    "a value comes back in front of the turn": (
        _note("reload", phase="forward"), "reload", "on one side of the turn", "the turn, or a round, between them",
    ),
    "a value is read after it has left": (
        _emit(aten.relu.default, "y", before="dx"), "relu", "reads y, which is offloaded to the host",
        "what geminifx.arrive returned",
    ),
    "a value is read after it has left through a view": (
        _emit(aten.relu.default, "flat", before="dx"), "relu", "reads y, which is offloaded", "geminifx.arrive",
    ),
    "a value is overwritten on its way": (
        _emit(aten.copy_.default, "flat", "flat", before="z"), "copy_", "overwrites y on its way", "geminifx.depart",
    ),
}  # fmt: skip


def _nodes(program):
    return {node.name: node for node in program.nodes}


GOODS = {"chunks": (GOOD, FACTS), "collectives": (EXCHANGING, (overlapped,)), "activations": (OFFLOADING, (offloaded,))}


@pytest.mark.parametrize("text, facts", GOODS.values(), ids=GOODS)
def test_the_good_program_is_good(text, facts):
    verify(parse_program(text), Plan(), facts, "none")


@pytest.mark.parametrize("damage, name, found, expected", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_named(damage, name, found, expected):
    _check_damage(GOOD, FACTS, damage, name, found, expected)


@pytest.mark.parametrize("damage, name, found, expected", COLLECTIVE_DAMAGES.values(), ids=COLLECTIVE_DAMAGES)
def test_damage_to_exchanges_is_found_and_named(damage, name, found, expected):
    _check_damage(EXCHANGING, (overlapped,), damage, name, found, expected)


@pytest.mark.parametrize("damage, name, found, expected", OFFLOAD_DAMAGES.values(), ids=OFFLOAD_DAMAGES)
def test_damage_to_offloaded_activations_is_found_and_named(damage, name, found, expected):
    _check_damage(OFFLOADING, (offloaded,), damage, name, found, expected)


UNPLACED = Plan()
LAID_OUT = Plan(layout=Layout((
    ChunkLayout(0, 64, torch.float32, torch.float32, True, (Slot("fc.weight", 0, (4, 4)), Slot("fc.bias", 32, (4,)))),
)))  # fmt: skip
PLACE_DAMAGES = {
    "a chunk too many": (_arguments("reduce", "gradients", 7, [0]), "reduce", "chunk 7", "one of the layout's 1"),
    "a view of no parameter": (_arguments("w", "wait", 16, [4, 4]), "w", r"\[4, 4\] at 16", "a parameter of chunk 0"),
    "a gradient elsewhere": (_arguments("put", "gradients", 16, "dw"), "reduce", r"\(16, 16\)", r"\(0, 16\)"),
    "a gradient that is not there": (
        lambda program, node: [_arguments(name, "gradients", 0, [0, 1])(program, node) for name in END.split(", ")],
        "reduce", r"\[\(0, 16\)\]", r"\(32, 4\)",
    ),
    "another end": (_arguments("accumulate_grad", "gradients", 0, []), "accumulate_grad", r"\[\]", r"\[0\]"),
    "a slot too many": (
        lambda program, node: [_arguments(name, "gradients", 0, [2])(program, node) for name in END.split(", ")],
        "reduce", r"slots \[2\]", "chunk's 2, from 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, name, found, expected", PLACE_DAMAGES.values(), ids=PLACE_DAMAGES)
def test_what_misses_its_place_in_a_chunk_is_found_and_named(damage, name, found, expected):
    _check_damage(GOOD, FACTS, damage, name, found, expected, LAID_OUT)


def _check_damage(text, facts, damage, name, found, expected, plan=UNPLACED):
    program = parse_program(text)
    verify(program, plan, facts, "none")  # that it was right counts for nothing afterwards
    damage(program, _nodes(program))
    with pytest.raises(VerificationError) as raised:
        verify(program, plan, facts, "clumsy")
    first, *rest = str(raised.value).splitlines()
    assert first.startswith("after pass 'clumsy', 'training' breaks '") and f" at '{name}' (" in first
    assert [line.split(":")[0].strip() for line in rest[:2]] == ["found", "expected"]
    assert re.search(found, rest[0]) and re.search(expected, rest[1])
    (marked,) = [line for line in rest if line.startswith("    > ")]
    assert marked.startswith(f"    > {name}: ")
    assert len(rest) <= 6, "a window around the node, never the program"
    assert "The pass 'clumsy' is at fault" in rest[-1]


def test_the_message_tells_where_in_the_model():
    program = parse_program(GOOD)
    annotate(_nodes(program)["dx"], type=None)
    with pytest.raises(VerificationError, match=r"at 'dx' \(backward: fc\)"):
        verify(program, Plan(), FACTS, "clumsy")


def test_the_message_tells_where_the_module_stands_in_the_source():
    program = parse_program(GOOD)
    program.sources = {"fc": "modeling_opt.py:190", "head": "modeling_opt.py:700"}
    program = program.copy()
    annotate(_nodes(program)["dx"], type=None)
    with pytest.raises(VerificationError, match=r"at 'dx' \(backward: fc, modeling_opt\.py:190\)"):
        verify(program, Plan(), FACTS, "clumsy")


def test_facts_are_checked_only_when_given():
    program = parse_program(GOOD)
    program.graph.erase_node(_nodes(program)["release"])
    verify(program, Plan(), (canonical, turned, chunked), "none")


def test_evaluation_may_have_no_backward_node():
    program = parse_program(
        'def evaluation(x: "f32[4] | input:0"):\n'
        "    # backward\n"
        '    y: "f32[4]" = aten.relu.default(x)\n'
        '    return {"output:0": y}\n'
    )
    with pytest.raises(VerificationError, match="breaks 'turned' at 'y'"):
        verify(program, Plan(), (turned,), "clumsy")


SHARED = """
def block(h: "f32[4]"):
    y: "f32[4]" = aten.relu.default(h)
    return [y]

def evaluation(x: "f32[4] | input:0"):
    # forward
    box = [x]
    results: "(f32[4])" = block(box)
    y: "f32[4]" = results[0]
    return {"output:0": y}
"""


@pytest.mark.parametrize("name", ["3x3_forward", "def", "f(): pass\nimport os\ndef g", "größe"])
def test_a_function_whose_name_is_no_name_is_found(name):
    program = parse_program(SHARED)
    program.functions = {name: program.functions["block"]}
    next(node for node in program.nodes if node.op == "call_module").target = name
    with pytest.raises(VerificationError, match="'evaluation' breaks 'well_formed'") as raised:
        verify(program, Plan(), (), "clumsy")
    assert f"a function called {name!r}" in str(raised.value)


def test_a_value_that_hides_a_function_is_found():
    program = parse_program(SHARED)
    _nodes(program)["y"].name = "block"
    with pytest.raises(VerificationError, match="'evaluation' breaks 'well_formed' at 'block'"):
        verify(program, Plan(), (), "clumsy")


def test_shared_segments_are_verified_too():
    program = parse_program(SHARED)
    verify(program, Plan(), (), "none")
    inner = program.functions["block"]
    annotate(_nodes(inner)["y"], type=parse_type("f32[5]"))
    with pytest.raises(VerificationError) as raised:
        verify(program, Plan(), (), "clumsy")
    # The call is what is typed wrongly as long as its function says so; then the function itself.
    assert "'evaluation' breaks 'well_typed' at 'results'" in str(raised.value)
    annotate(_nodes(program)["results"], type=(parse_type("f32[5]"),))
    annotate(_nodes(program)["y"], type=parse_type("f32[5]"))
    with pytest.raises(VerificationError, match="'block' breaks 'well_typed' at 'y'"):
        verify(program, Plan(), (), "clumsy")
