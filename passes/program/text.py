"""Programs as text: typed Python that parses back to the same program, and that Python can run.

    def training(x: "f32[8, 4] | input:0", w: "f32[4, 4] | parameter:fc.weight"):
        # forward: fc
        t: "f32[4, 4]{1, 4}" = aten.t.default(w)
        mm: "f32[8, 4]" = aten.mm.default(x, t)
        turn: "(f32[8, 4])" = yield [mm], [0]
        ...
        return {"gradient:fc.weight": mm_1}

A training program is a generator: at `yield` it hands its outputs to the caller and sleeps until it is sent their
gradients, the tangents. Its saved activations are simply its local variables. `executable=True` adds what running
needs: each value is deleted after its last use, and a shared segment takes its arguments in a list that it empties, so
that its callers do not keep them alive.
"""

import ast
import math
import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import fx

from ...runtime.isa.errors import as_cause
from ...runtime.isa.instructions import NAMESPACE, PLACED, TURN
from .names import escaped, quoted, unescaped
from .program import Note, Program, annotate, note, type_of
from .types import Type, parse_type, type_text

_WORLD = {"inf": math.inf, "nan": math.nan, "DEVICE": torch.device("cpu")}
"""Names a program may use besides torch's and its own. DEVICE is the device that the program will run on."""
_BETWEEN_FIELDS = "|"
_CONTEXT = re.compile(r"\s+# (forward|backward|recompute)(?: ([FBIW]\d*\.\d+)( recompute)?)?(?:: (.*))?$", re.ASCII)
FUSED = "fused"
"""Name of the decorator of functions that are compiled to as few kernels as possible."""


# -- printing ----------------------------------------------------------------------------------------------


def print_program(program: Program, executable: bool = False) -> str:
    """The program as Python source, shared segments first."""
    parts = [_Printer(function, executable, boxed=executable).text() for function in program.functions.values()]
    return "\n\n".join([*parts, _Printer(program, executable, boxed=False).text()])


class _Printer:
    """Prints one function. If `boxed`, it takes its arguments in a list, `box`, which it empties."""

    def __init__(self, program: Program, executable: bool, boxed: bool) -> None:
        self.program = program
        self.executable = executable
        self.boxed = boxed
        self.last_reader = _last_readers(program) if executable else {}
        self.origin: Note | None = None

    def text(self) -> str:
        return "\n".join(self._lines()) + "\n"

    def _header(self) -> list[str]:
        return ([f"@{NAMESPACE}.{FUSED}"] if self.program.is_fused else []) + self._definition()

    def _definition(self) -> list[str]:
        inputs = self.program.placeholders
        if self.boxed and not self.program.is_fused:
            names = ", ".join(node.name for node in inputs)
            return [
                f"def {self.program.name}(box):",
                *([f"    [{names}] = box"] if inputs else []),
                "    box.clear()",
            ]
        if not inputs:
            return [f"def {self.program.name}():"]
        typed = [f"    {node.name}: {_annotation(node)}," for node in inputs]
        return [f"def {self.program.name}(", *typed, "):"]

    def _lines(self) -> list[str]:
        lines = self._header()
        lines += self._drop([node for node in self.program.placeholders if not node.users])
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                continue
            lines += self._context_line(node)
            lines += ["    " + line for line in self._statement(node)]
        return lines

    def _context_line(self, node: fx.Node) -> list[str]:
        """A comment with the node's phase, action and module if they change here. Nodes that the plan places come from
        no module."""
        before, origin = self.origin, note(node)
        stays = before is not None and (before.phase, before.action) == (origin.phase, origin.action)
        if node.op == "output" or (stays and node.target in PLACED):
            return []
        self.origin = origin
        return [f"    # {_context(origin)}"] if before is None or _context(before) != _context(origin) else []

    def _statement(self, node: fx.Node) -> list[str]:
        if node.op == "output":
            return [f"return {_value(node.args[0])}"]
        dying = [value for value in node.all_input_nodes if self.last_reader.get(value) is node]
        binding = f"{node.name}: {_annotation(node)} = "
        if node.op == "call_module" and self.program.functions[str(node.target)].is_fused:
            call = f"{node.target}({', '.join(map(_value, node.args))})"
            return [binding + call, *self._delete(dying), *self._unread(node)]
        if node.op == "call_module":
            lines = [f"box = {_value(list(node.args))}", *self._delete(dying)]
            return [*lines, f"{binding}{node.target}(box)", *self._unread(node)]
        if type_of(node) is None and not node.users:
            binding = ""
        return [binding + call_text(node), *self._delete(dying), *self._unread(node)]

    def _delete(self, values: list[fx.Node]) -> list[str]:
        return [f"del {', '.join(value.name for value in values)}"] if values and self.executable else []

    def _unread(self, node: fx.Node) -> list[str]:
        return self._delete([node]) if not node.users and type_of(node) is not None else []

    def _drop(self, values: list[fx.Node]) -> list[str]:
        return ["    " + line for line in self._delete(values)]


def _last_readers(program: Program) -> dict[fx.Node, fx.Node]:
    last: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        for value in node.all_input_nodes:
            last[value] = node
    return last


def _context(origin: Note) -> str:
    if origin.action:
        phase = f"{origin.phase} {origin.action}" + (" recompute" if origin.recomputed else "")
    else:
        phase = "recompute" if origin.recomputed else origin.phase
    return f"{phase}: {escaped(origin.module)}" if origin.module else phase


def _annotation(node: fx.Node) -> str:
    origin = note(node)
    fields = [type_text(origin.type), escaped(origin.role, _BETWEEN_FIELDS)]
    fields += [f"tied={escaped(origin.tied, _BETWEEN_FIELDS)}"] if origin.tied else []
    fields += [f"chunk={origin.chunk}"] if origin.chunk is not None else []
    fields += [f"on {origin.placement}"] if origin.placement else []
    return quoted(f" {_BETWEEN_FIELDS} ".join(text for text in fields if text))


def call_text(node: fx.Node) -> str:
    """The right-hand side of a node's statement."""
    if node.target is operator.getitem:
        return f"{_value(node.args[0])}[{_value(node.args[1])}]"
    if node.target is TURN:
        return f"yield {_value(node.args[0])}, {_value(node.args[1])}"
    arguments = [_value(value) for value in node.args]
    arguments += [f"{key}={_value(value)}" for key, value in node.kwargs.items()]
    return f"{target_text(node.target)}({', '.join(arguments)})"


@cache
def target_text(target: Any) -> str:
    """The name of an operator in a program's text."""
    if getattr(target, "__module__", "") == "_operator":  # arithmetic on Python numbers
        return f"operator.{target.__name__}"
    name = str(target)
    return name.removesuffix(".default") if name.startswith(NAMESPACE + ".") else name


def _value(value: Any) -> str:
    match value:
        case fx.Node():
            return value.name
        case dict():
            return "{" + ", ".join(f"{quoted(key)}: {_value(item)}" for key, item in value.items()) + "}"
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case tuple():
            return f"({', '.join(map(_value, value))}{',' if len(value) == 1 else ''})"
        case torch.device():
            return "DEVICE"
        case slice():
            return f"slice({_value(value.start)}, {_value(value.stop)}, {_value(value.step)})"
    return repr(value)  # None, bool, int, float, str; dtypes, layouts and formats print as torch.<name>


# -- parsing -----------------------------------------------------------------------------------------------


def parse_program(text: str, constants: dict[str, torch.Tensor] | None = None) -> Program:
    """The inverse of `print_program`. Types are inferred again and must equal those in the text.

    Executable text can be parsed too, unless it has boxed segments, whose arguments carry no types. Raises ValueError,
    with the line, if the text is not a program or one of its types is wrong.
    """
    try:
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ValueError(f"line {error.lineno}: not Python: {error.msg}: {line}") from error
    if not functions:
        raise ValueError("the text contains no function; expected the output of print_program")
    parsed: dict[str, Program] = {}
    for function in functions:
        parsed[function.name] = _Parser(text, function, parsed).parse()
    program = parsed.pop(functions[-1].name)
    program.functions, program.constants = parsed, dict(constants or {})
    return program


class _Parser:
    """Parses one function, which may call the `functions` parsed before it."""

    def __init__(self, text: str, function: ast.FunctionDef, functions: dict[str, Program]) -> None:
        self.lines = text.splitlines()
        self.function = function
        self.functions = functions
        self.program = Program(function.name, is_fused=bool(function.decorator_list))
        self.names: dict[str, fx.Node] = {}
        self.origin = Note()
        self.box: list[Any] = []

    def parse(self) -> Program:
        for argument in self.function.args.args:
            with self._naming_line(argument):
                self._input(argument)
        # The inputs are in place; everything else goes in front of the output node.
        self.program.set_results({})
        for statement in self.function.body:
            with self._naming_line(statement):
                self._statement(statement)
        return self.program

    @contextmanager
    def _naming_line(self, at: ast.stmt | ast.arg) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # fake kernels raise all kinds of errors on ill-typed arguments
            line = self.lines[at.lineno - 1].strip()
            raise ValueError(f"line {at.lineno}: {error}: {line}") from as_cause(error)

    def _input(self, argument: ast.arg) -> None:
        type, fields = _read_annotation(argument.annotation)
        role = next((f for f in fields if ":" in f and "=" not in f.split(":")[0]), "")
        tied = next((f.removeprefix("tied=") for f in fields if f.startswith("tied=")), "")
        self.names[argument.arg] = self.program.add_input(argument.arg, type, role, tied)
        annotate(self.names[argument.arg], placement=_placement(fields))

    def _statement(self, statement: ast.stmt) -> None:
        self._read_context(statement.lineno - 1)
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
                self._bind(name, annotation, value)
            case ast.Assign(targets=[ast.Name(id="box")], value=value):
                self.box = self._value(value)
            case ast.Expr(value=ast.Call() | ast.Subscript() as value):
                self._emit(value, None)
            case ast.Return(value=ast.expr() as value):
                self.program.set_results(self._value(value))
            case ast.Delete() | ast.Pass():
                pass  # printing derives deletions from the order of reads
            case _:
                raise ValueError("not a program statement")

    def _bind(self, name: str, annotation: ast.expr, value: ast.expr) -> None:
        stated, fields = _read_annotation(annotation)
        node = self._emit(value, name)
        if type_of(node) != stated:
            raise ValueError(f"{name} is annotated as {type_text(stated)}, but it is {type_text(type_of(node))}")
        chunk = next((int(f.removeprefix("chunk=")) for f in fields if f.startswith("chunk=")), None)
        annotate(node, chunk=chunk, placement=_placement(fields))
        self.names[name] = node

    def _emit(self, value: ast.expr, name: str | None) -> fx.Node:
        target: Any
        args: tuple[Any, ...]
        kwargs: dict[str, Any] = {}
        match value:
            case ast.Yield(value=ast.Tuple(elts=[outputs, differentiable])):
                target, args = TURN, (self._value(outputs), self._value(differentiable))
            case ast.Subscript(value=source, slice=index):
                target, args = operator.getitem, (self._value(source), self._value(index))
            case ast.Call(func=ast.Name(id=function)) if function in self.functions:
                given = [self._value(item) for item in value.args] if self.functions[function].is_fused else self.box
                return self._call(function, given, name)
            case ast.Call():
                target = _resolve(value.func)
                args = tuple(self._value(item) for item in value.args)
                kwargs = {str(k.arg): self._value(k.value) for k in value.keywords}
            case _:
                raise ValueError("expected an operator call, a segment call, yield or value[i]")
        return self.program.emit(target, args, kwargs, before=self.program.output, like=self.origin, name=name)

    def _call(self, function: str, given: list[fx.Node], name: str | None) -> fx.Node:
        with self.program.graph.inserting_before(self.program.output):
            node = self.program.graph.create_node("call_module", function, tuple(given), {}, name=name)
        self.program.functions[function] = self.functions[function]
        results = self.functions[function].results
        annotate(node, type=tuple(type_of(v) for v in results), module=self.origin.module,
                 phase=self.origin.phase, recomputed=self.origin.recomputed, action=self.origin.action)  # fmt: skip
        return node

    def _read_context(self, line: int) -> None:
        match = _CONTEXT.match(self.lines[line - 1])
        if match:
            phase, action, again, module = match.groups()
            recomputed = phase == "recompute" or again is not None
            self.origin = Note(
                phase="backward" if phase == "recompute" else phase,  # type: ignore[arg-type]
                action=action or "", module=unescaped(module or ""), recomputed=recomputed,
            )  # fmt: skip

    def _value(self, value: ast.expr) -> Any:
        match value:
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.Name(id=name) if name in _WORLD:
                return _WORLD[name]
            case ast.Name(id=name):
                raise KeyError(f"unknown name {name}")
            case ast.Constant(value=constant):
                return constant
            case ast.List(elts=items):
                return [self._value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self._value(item) for item in items)
            case ast.Dict(keys=keys, values=values):
                return {self._value(k): self._value(v) for k, v in zip(keys, values, strict=True) if k}
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand)
            case ast.Attribute(value=ast.Name(id="torch"), attr=attribute):
                return getattr(torch, attribute)
            case ast.Call(func=ast.Name(id="slice"), args=[start, stop, step]):
                return slice(self._value(start), self._value(stop), self._value(step))
        raise ValueError("unknown kind of value")


def _read_annotation(annotation: ast.expr | None) -> tuple[Type, list[str]]:
    if not isinstance(annotation, ast.Constant) or not isinstance(annotation.value, str):
        raise ValueError('every name needs an annotation such as "f32[8, 4]"')
    first, *fields = annotation.value.split(f" {_BETWEEN_FIELDS} ")
    return parse_type(first), [unescaped(field) for field in fields]


def _placement(fields: list[str]) -> str:
    return next((f.removeprefix("on ") for f in fields if f.startswith("on ")), "")


def _resolve(function: ast.expr) -> Any:
    path = ast.unparse(function).split(".")
    if path[0] == "operator":
        return getattr(operator, path[1])
    if path[0] == NAMESPACE:
        path.append("default")
    target: Any = torch.ops
    for part in path:
        target = getattr(target, part)
    return target
