"""Programs as text: printing and parsing are inverse, and the executable form is Python that runs."""

import ast
import math
import operator

import pytest
import torch
from geminifx.passes.pipeline import PIPELINE
from geminifx.passes.program.manager import Pass, run_passes
from geminifx.passes.program.names import escaped, identifier, is_identifier, quoted, unescaped
from geminifx.passes.program.program import Program, annotate, type_of
from geminifx.passes.program.text import parse_program, print_program
from geminifx.passes.program.types import parse_type
from hypothesis import given, settings
from hypothesis import strategies as st

aten = torch.ops.aten

WORLD = {"torch", "aten", "geminifx", "inf", "nan", "DEVICE", "slice"}
"""The names that an executable text may use without making them."""


def assert_executable(text):
    """Compiles, and on every line reads only what has been made and not yet deleted."""
    compile(text, "program", "exec")
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        alive = {argument.arg for argument in function.args.args}
        local = alive | {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert not local & (WORLD | {f.name for f in functions}), "a local name hides a global one"
        for statement in function.body:
            names = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
            reads = {n.id for n in names if not isinstance(n.ctx, ast.Store)} & local
            assert reads <= alive, f"{ast.unparse(statement)}: {reads - alive} not there"
            alive |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
            alive -= {n.id for n in names if isinstance(n.ctx, ast.Del)}
        returned = {n.id for n in ast.walk(function.body[-1]) if isinstance(n, ast.Name)}
        assert alive - {"box"} <= returned, "everything that is not returned has been deleted"


def assert_round_trip(program, same):
    text = print_program(program)
    again = parse_program(text, program.constants)
    same(again, program)
    assert print_program(again) == text
    executable = print_program(program, executable=True)
    assert_executable(executable)
    if not program.functions:
        same(parse_program(executable, program.constants), program)


# -- captured programs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_captured_programs_round_trip_before_and_after_every_pass(captured, same):
    program, plan = captured
    assert_round_trip(program, same)
    look = Pass("look", lambda program, plan: assert_round_trip(program, same))
    run_passes(program, plan, [each for current in PIPELINE for each in (current, look)])


def test_evaluation_programs_round_trip(evaluation, same):
    program, plan = evaluation
    run_passes(program, plan, PIPELINE)
    assert_round_trip(program, same)


def test_a_copy_is_the_same_and_independent(captured, same):
    program, plan = captured
    copy = program.copy()
    same(copy, program)
    run_passes(copy, plan, PIPELINE)
    assert copy.inputs("parameter") == {} and program.inputs("parameter") != {}


# -- random programs ---------------------------------------------------------------------------------------

SQUARE = "f32[4, 4]"
NAMES = ["x", "x_1", "box", "aten", "inf", "lambda", "slice", "mul_01", "_private", "Upper", "results", "0_weight"]
MODULES = ["", "fc", "layers.0.attn", "layers.10"]
HOSTILE = [
    *("en-de", "3x3", "class", "a\nimport os", "a\rb", "\x0b\x0c\x1c\u2028", 'say "hi"', "it's", "#", "\\", "\\n", " "),
    *('x"\n    raise SystemExit  #', "a | tied=b", " | chunk=3", "on x", "größe", "重み", "\u202e", "\ud800", "\0"),
]
TEXTS = st.sampled_from(HOSTILE) | st.text(st.characters(exclude_characters="."), min_size=1, max_size=12)
"""Names that a model may give to its modules, parameters and buffers."""
UNARY = [
    lambda draw, x: (aten.relu.default, (x,)),
    lambda draw, x: (aten.t.default, (x,)),
    lambda draw, x: (aten.bernoulli.p, (x, draw(st.floats(0, 1)))),
    lambda draw, x: (aten.clamp.default, (x, draw(st.floats(allow_nan=False)), math.inf)),
    lambda draw, x: (aten.full_like.default, (x, draw(st.floats() | st.booleans() | st.integers(-9, 9)))),
    lambda draw, x: (aten.roll.default, (x, [draw(st.integers(-4, 4))], [0])),
]


@st.composite
def programs(draw):
    """A program with every kind of node that text knows but shared segments."""
    program = Program(draw(st.sampled_from(["training", "evaluation", "f"])))
    program.set_results({})
    values = []
    for i in range(draw(st.integers(1, 3))):
        role = draw(st.sampled_from(["input:", "parameter:layers.0.w", "buffer:b", "tangent:", "constant:c"])) + str(i)
        role = draw(st.just(role) | TEXTS.map("parameter:{}".format))
        tied = draw(st.sampled_from(["", "first.w"]) | TEXTS)
        values.append(program.add_input(draw(st.sampled_from(NAMES) | TEXTS), parse_type(SQUARE), role, tied))
    for _ in range(draw(st.integers(0, 8))):
        x, y = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        emit = lambda target, args, **kwargs: program.emit(  # noqa: E731
            target, args, kwargs, before=program.output, name=draw(st.none() | st.sampled_from(NAMES) | TEXTS)
        )
        kind = draw(st.sampled_from(["unary", "binary", "tuple", "write"]))
        if kind == "unary":
            node = emit(*draw(st.sampled_from(UNARY))(draw, x))
        elif kind == "binary":
            node = emit(aten.add.Tensor, (x, y), alpha=draw(st.sampled_from([1, 2, 0.5, -1])))
        elif kind == "tuple":
            pieces = emit(aten.split.Tensor, (x, 2, draw(st.sampled_from([0, -2]))))
            part = emit(operator.getitem, (pieces, draw(st.sampled_from([0, 1, -1, slice(0, 1), slice(None)]))))
            part = emit(operator.getitem, (part, 0)) if isinstance(type_of(part), tuple) else part
            node = emit(aten.expand.default, (emit(aten.sum.default, (part,)), [4, 4]))
        else:
            emit(torch.ops.geminifx.put.default, (x, 0, y))
            continue
        phase, recomputed = draw(st.sampled_from([("forward", False), ("backward", False), ("backward", True)]))
        annotate(node, phase=phase, recomputed=recomputed, module=draw(st.sampled_from(MODULES) | TEXTS))
        annotate(node, chunk=draw(st.none() | st.integers(0, 12)))
        values.append(node)
    role = st.sampled_from(["output:0", "gradient:layers.0.w", "mutation:b"]) | TEXTS.map("gradient:{}".format)
    roles = draw(st.lists(role, unique=True, max_size=4))
    program.set_results({role: draw(st.sampled_from(values)) for role in roles})
    return program


@settings(max_examples=80)
@given(program=programs())
def test_random_programs_round_trip(program, same):
    assert_round_trip(program, same)


# -- names -------------------------------------------------------------------------------------------------


@given(text=st.sampled_from(NAMES + HOSTILE) | st.text())
def test_every_text_makes_a_name_and_names_stay(text):
    name = identifier(text)
    assert is_identifier(name) and identifier(name) == name
    exec(f"def {name}({name}): return {name}", world := {})
    assert world[name](1) == 1


@given(text=TEXTS, special=st.sampled_from(["", "|"]))
def test_escaped_texts_stand_on_one_line_and_are_read_back(text, special):
    line = escaped(text, special)
    assert line.isprintable() and not set(special) & set(line)
    assert unescaped(line) == text
    assert unescaped(ast.literal_eval(quoted(line))) == text


@settings(max_examples=40)
@given(names=st.lists(TEXTS, min_size=3, max_size=3, unique=True))
def test_a_program_of_any_names_runs_and_nothing_of_them_does(names):
    """Two inputs and a module: their names are told in the annotations, in the comment and in the results."""
    program = Program("evaluation")
    program.set_results({})
    x, y = (program.add_input(name, parse_type("f32[2]"), f"parameter:{name}") for name in names[:2])
    total = program.emit(aten.add.Tensor, (x, y), before=program.output, name=names[2])
    annotate(total, module=names[2])
    program.set_results({f"gradient:{name}": total for name in names})
    tree = ast.parse(print_program(program, executable=True))
    statements = [type(statement) for statement in tree.body[0].body]
    assert len(tree.body) == 1 and statements == [ast.AnnAssign, ast.Delete, ast.Return]
    world = {"torch": torch, "aten": aten}
    exec(print_program(program, executable=True), world)
    results = world["evaluation"](torch.ones(2), torch.ones(2))
    assert list(results) == [f"gradient:{name}" for name in names]
    assert all(torch.equal(value, torch.full((2,), 2.0)) for value in results.values())


# -- arguments ---------------------------------------------------------------------------------------------

ARGUMENTS = """
def evaluation(x: "f32[1, 2, 4, 4] | input:0"):
    # forward
    a: "f32[1, 2, 4, 4]" = aten.clamp.default(x, -inf, inf)
    b: "f32[1, 2, 4, 4]{32, 1, 8, 2}" = aten.clone.default(a, memory_format=torch.channels_last)
    c: "f32[1, 2, 4, 4]{32, 1, 8, 2}" = aten.div.Tensor_mode(b, 2, rounding_mode='floor')
    d: "f16[3]" = aten.full.default([3], nan, dtype=torch.float16, layout=torch.strided, device=DEVICE)
    e: "(f32[1, 1, 4, 4]{32, 16, 4, 1}, f32[1, 1, 4, 4]{32, 16, 4, 1})" = aten.split.Tensor(x, 1, 1)
    f: "(f32[1, 1, 4, 4]{32, 16, 4, 1})" = e[slice(None, -1, None)]
    g: "f32[1, 1, 4, 4]{32, 16, 4, 1}" = f[-1]
    h: "f32[]" = aten.sum.default(g)
    i: "i64[2]" = aten.full.default([2], True, dtype=torch.int64)
    j: "f32[2]" = aten.full.default([2], -0.0)
    k: "f32[1, 2, 16]" = aten.view.default(x, [1, 2, -1])
    return {"output:0": c, "output:1": d, "output:2": h, "output:3": i, "output:4": j, "output:5": k}
"""


def test_every_kind_of_argument(same):
    program = parse_program(ARGUMENTS)
    body = lambda text: [line for line in text.splitlines() if " = " in line]  # noqa: E731
    assert body(print_program(program)) == body(ARGUMENTS)
    assert_round_trip(program, same)
    clamp, clone, _, full = (n for n in program.computes if n.name in "abcd")
    assert clamp.args[1:] == (-math.inf, math.inf)
    assert clone.kwargs == {"memory_format": torch.channels_last}
    assert math.isnan(full.args[1]) and full.kwargs["dtype"] is torch.float16


def test_the_executable_text_computes():
    program = parse_program(ARGUMENTS)
    world = {"torch": torch, "aten": aten, "inf": math.inf, "nan": math.nan, "DEVICE": torch.device("cpu")}
    exec(print_program(program, executable=True), world)
    x = torch.randn(1, 2, 4, 4)
    c, d, h, i, j, k = world["evaluation"](x.clone()).values()
    assert torch.equal(c, x.div(2).floor()) and c.is_contiguous(memory_format=torch.channels_last)
    assert d.isnan().all() and torch.equal(h, x[:, 0].sum()) and i.tolist() == [1, 1]
    assert j.signbit().all() and torch.equal(k, x.flatten(2))


ABSENT = """
def evaluation(g: "f32[1, 2, 2, 2] | input:0", x: "f32[1, 2, 4, 4] | input:1", w: "f32[2, 2, 3, 3] | input:2"):
    # forward
    grads: "(none, f32[2, 2, 3, 3], none)" = aten.convolution_backward.default(g, x, w, [0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])
    grads[0]
    dw: "f32[2, 2, 3, 3]" = grads[1]
    return {"output:0": dw}
"""  # noqa: E501


def test_an_element_that_is_absent(same):
    program = parse_program(ABSENT)
    assert_round_trip(program, same)
    (unread,) = [n for n in program.computes if n.args[1:] == (0,)]
    program.set_results({"output:0": unread})  # printed with a name as soon as somebody reads it
    assert_round_trip(program, same)


SHARED = """
def block_forward(
    h: "f32[4, 4]",
    w: "f32[4, 4]",
):
    # forward: attn
    y: "f32[4, 4]" = aten.mm.default(h, w)
    # recompute
    z: "f32[4, 4]" = aten.relu.default(y)
    return [y, z]


def training(
    x: "f32[4, 4] | input:0",
):
    # forward: layers.0
    box = [x, x]
    results: "(f32[4, 4], f32[4, 4])" = block_forward(box)
    y: "f32[4, 4]" = results[1]
    # forward: layers.1
    box = [y, x]
    results_1: "(f32[4, 4], f32[4, 4])" = block_forward(box)
    z: "f32[4, 4]" = results_1[0]
    turn: "(f32[4, 4])" = yield [z], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    return {"gradient:input:0": tangent}
""".lstrip()


def test_shared_segments(same):
    program = parse_program(SHARED)
    assert print_program(program) == SHARED
    assert_round_trip(program, same)
    executable = print_program(program, executable=True)
    assert "    [h, w] = box\n    box.clear()\n" in executable
    # Nobody above the segment keeps its arguments alive.
    assert "    box = [y, x]\n    del y, x\n" in executable
    with pytest.raises(ValueError, match="line 1"):
        parse_program(executable)


def test_names_that_the_text_uses_itself_are_not_given_to_values():
    program = Program("f")
    program.set_results({})
    inputs = [program.add_input(name, parse_type("f32[2]"), "") for name in ("box", "aten", "inf", "DEVICE")]
    assert not {node.name for node in inputs} & WORLD | {"box"} & {node.name for node in inputs}


# -- what is not a program ---------------------------------------------------------------------------------

GOOD = """\
def evaluation(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 2] | parameter:w",
):
    # forward
    y: "f32[4, 2]" = aten.mm.default(x, w)
    return {"output:0": y}
"""


@pytest.mark.parametrize(
    "old, new, line, says",
    [
        ('"f32[4, 2]" =', '"f32[2, 4]" =', 6, r"y is annotated as f32\[2, 4\], but it is f32\[4, 2\]"),
        ("mm.default(x, w)", "mm.default(w, x)", 6, "mm"),
        ("mm.default(x, w)", "mm.default(x)", 6, "missing"),
        ("mm.default(x, w)", "mm.default(x, v)", 6, "unknown name v"),
        ("aten.mm", "aten.mn", 6, "mn"),
        ("aten.mm.default(x, w)", "x + w", 6, "expected an operator call"),
        ("aten.mm.default(x, w)", "aten.mm.default(x, lambda: w)", 6, "unknown kind of value"),
        ('y: "f32[4, 2]"', "y", 6, "not a program statement"),
        ('y: "f32[4, 2]"', "y: int", 6, "needs an annotation"),
        ('y: "f32[4, 2]"', 'y: "f33[4]"', 6, "not a type"),
        ("# forward", "if x: pass", 5, "not a program statement"),
        ("f32[4, 2] | par", "f32[4, 2 | par", 3, "not a type"),
        ('w: "f32[4, 2] | parameter:w"', "w", 3, "needs an annotation"),
        ("mm.default(x, w)", "mm.default(x, w", 6, "not Python"),
    ],
)
def test_errors_name_the_line(old, new, line, says):
    assert old in GOOD
    with pytest.raises(ValueError, match=f"^line {line}: .*{says}") as raised:
        parse_program(GOOD.replace(old, new))
    assert GOOD.replace(old, new).splitlines()[line - 1].strip() in str(raised.value)


def test_text_without_a_function_is_refused():
    with pytest.raises(ValueError, match="contains no function"):
        parse_program("x = 1")
