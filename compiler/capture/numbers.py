"""Number arguments that become inputs of a program: those that a forward only computes with.

    def forward(self, x, t):            def training(x: "f32[8, 4] | input:0", t: "float | number:1", ...):
        return (1 - t) * self.fc(x)         sub: "float" = operator.sub(1.0, t)

Such a number is traced without a value, as one of torch's symbolic numbers, and stays a Python number for operators, so
that types are promoted as usual. If the code asks for its value, by a condition, a loop or a shape, the trace fails,
and the number becomes a constant of the program. The same happens where Python could tell that the number is symbolic.
"""

import dis
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...passes.program.program import Program, note, type_of
from ...passes.program.types import NumberType, freeze
from ...runtime.isa.errors import CaptureError
from ...runtime.isa.torch_private import ShapeEnv

_DTYPES = {float: torch.float64, int: torch.int64}
_SYMBOLIC = (torch.SymFloat, torch.SymInt)
_ASKED = torch.ops.aten._local_scalar_dense.default
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_METHODS = (
    *(f"__{side}{name}__" for side in ("", "r") for name in _BINARY),
    *(f"__{name}__" for name in ("neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge")),
)


class NumberReadError(CaptureError):
    """The forward asks for the value of a number that was to be an input."""


def can_be_input(leaf: Any) -> bool:
    return type(leaf) in _DTYPES


def standing_for(number: float) -> Tensor:
    """The placeholder tensor from which the trace takes the symbolic number."""
    return torch.empty((), dtype=_DTYPES[type(number)])


def number_type(number: float) -> NumberType:
    return NumberType(type(number).__name__)


def taken_out(tensor: Tensor) -> Any:
    """The symbolic number held by a zero-dimensional tensor."""
    return _as_number(tensor.item())


# -- symbolic numbers that pass for Python's ---------------------------------------------------------------


def _unreadable(self: Any, *_: object) -> Any:
    raise NumberReadError("a number was converted to text")


def _class_like(python: type, symbolic: type) -> type:
    """A subclass of `symbolic` that reports `python` as its class; so does everything computed from its instances."""

    def method(name: str) -> Callable[..., Any]:
        plain = getattr(symbolic, name)
        return lambda self, *others: _as_number(plain(symbolic(self.node), *map(_as_symbolic, others)))

    methods = {name: method(name) for name in _METHODS if hasattr(symbolic, name)}
    hidden = {"__class__": property(lambda _: python), "__repr__": _unreadable, "__format__": _unreadable}
    return type(symbolic.__name__, (symbolic,), {**methods, **hidden})


_Float, _Int = _class_like(float, torch.SymFloat), _class_like(int, torch.SymInt)


def _as_number(value: Any) -> Any:
    kind = {torch.SymFloat: _Float, torch.SymInt: _Int}.get(type(value))
    return value if kind is None else kind(value.node)


def _as_symbolic(value: Any) -> Any:
    kind = {_Float: torch.SymFloat, _Int: torch.SymInt}.get(type(value))
    return value if kind is None else kind(value.node)


# -- whether they were only computed with ------------------------------------------------------------------


@contextmanager
def no_types_asked(model: nn.Module) -> Iterator[None]:
    """Raises NumberReadError on leaving if the model's Python used `type`, which tells a symbolic number from a plain
    one. Only functions of the packages that define the model's modules are checked, torch excepted."""
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()} - {"torch"}
    codes: set[CodeType] = set()

    def called(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").partition(".")[0] in packages:
            codes.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(before)
    asking = next((code for code in codes if _asks_for_types(code)), None)
    if asking is not None:
        raise NumberReadError(f"{asking.co_filename}:{asking.co_firstlineno} ({asking.co_name}) asks for types")


def _asks_for_types(code: CodeType) -> bool:
    instructions = dis.get_instructions(code) if "type" in code.co_names else ()
    return any(each.opname == "LOAD_GLOBAL" and each.argval == "type" for each in instructions)


def check_only_computed(graph: fx.Graph, environment: ShapeEnv) -> None:
    """Raises NumberReadError if the graph uses numbers as anything but operands of arithmetic. Rewrites the graph's
    arithmetic on them to Python's."""
    for node in graph.find_nodes(op="call_function", target=torch.sym_float):
        node.target, node.args = operator.truediv, (node.args[0], 1)
    if environment.guards or environment.deferred_runtime_asserts:
        raise NumberReadError("a condition depends on a number")
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, _SYMBOLIC):
            known = node.args[0].op == "placeholder" if node.target is _ASKED else is_arithmetic(node.target)
        else:
            known = _has_shape(value) and all(map(_is_operand_type, _types_of_numbers(node)))
        if not known:
            raise NumberReadError(f"{node.target} takes or produces a number that determines more than values")


def is_arithmetic(target: Any) -> bool:
    """Whether `target` is one of Python's own operators on numbers."""
    return getattr(target, "__module__", "") == "_operator" and target is not operator.getitem


def is_taken_out(node: fx.Node) -> bool:
    """Whether a traced node takes a symbolic number out of a tensor."""
    return node.target is _ASKED and isinstance(node.meta.get("val"), _SYMBOLIC)


def _has_shape(value: Any) -> bool:
    tensors = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    return all(isinstance(size, int) for t in tensors for size in (*t.shape, *t.stride()))


def _types_of_numbers(node: fx.Node) -> Iterator[str]:
    """The schema types of the arguments in which an operator reads numbers; "a list" if they are nested in one."""
    declared = {a.name: a.type for a in node.target._schema.arguments} if hasattr(node.target, "_schema") else {}
    given = {**dict(zip(declared, node.args, strict=False)), **node.kwargs}
    for name, value in given.items():
        read: list[fx.Node] = []
        fx.map_arg(value, read.append)
        if any(isinstance(each.meta.get("val"), _SYMBOLIC) for each in read):
            yield str(declared[name]) if isinstance(value, fx.Node) else "a list"


def _is_operand_type(declared: str) -> bool:
    return declared.removeprefix("Optional[").removesuffix("]") in ("number", "Tensor")


# -- whether a program is another one with its numbers in place --------------------------------------------


def is_same_step(general: Program, special: Program, numbers: Mapping[str, float]) -> bool:
    """Whether `general` with `numbers`, by role, for its inputs equals `special`, which has them as constants."""
    return _described(general, numbers) == _described(special, {})


def _described(program: Program, numbers: Mapping[str, float]) -> list[Any]:
    values: dict[fx.Node, Any] = {}
    rows: list[Any] = []
    for node in program.graph.nodes:
        if note(node).role in numbers:
            values[node] = numbers[note(node).role]
        elif is_arithmetic(node.target):
            values[node] = node.target(*fx.map_arg(node.args, values.__getitem__))
        elif node.op == "output":
            rows.append({role: values[value] for role, value in node.args[0].items()})
        else:
            values[node] = _Place(len(rows))
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            told = freeze((args, kwargs), lambda value: value) if node.op == "call_function" else note(node).role
            rows.append((node.op, node.target if node.op == "call_function" else "", told, type_of(node)))
    return rows


class _Place(int):
    """Stands for a node by its position; never equal to a number."""

    def __eq__(self, other: object) -> bool:
        return type(other) is _Place and int(self) == int(other)

    __hash__ = int.__hash__
