"""Turns the program of one microbatch into one that takes the whole batch and reads a microbatch from it.

This is valid only if the whole batch's values follow from those of all microbatches. That is proven first, on two
captures of the forward: with the whole batch, and with one part of it. They must be equal, operator by operator, but
for sizes, and each operator must have a legal row for the placements of its arguments: split by examples, the same for
all, or terms of a sum or of a mean over the microbatches. The backward needs no proof: it is the derivative of the
part's forward, with the gradient of a mean divided among its terms.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from ...runtime.isa.errors import SplitError
from ...runtime.isa.instructions import MICROBATCH
from ...runtime.isa.mesh import PARTIAL, REPLICATE, Partial, Placement, Shard
from ..program.program import Note, Program, annotate, is_random, note, tensor_type, type_of
from ..program.text import target_text
from ..program.types import TensorType, Type
from .examples import DRAWS, FILLS, MEAN, Rows, legal
from .rules import Call, Row, operand_type, tensors

aten = torch.ops.aten
LAYOUT = aten.clone.default
"""Copies into another memory layout, which the part may need where the whole does not, or the reverse."""

SIZED = FILLS | {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default,
    aten.rand.default, aten.randn.default, aten.randint.default, aten.randint.low,
}  # fmt: skip
"""Operators that take the sizes of their results as a list."""

SAME = {aten._unsafe_view.default: aten.view.default, aten.reshape.default: aten.view.default}
COUNTED = (aten.view.default, aten.unsqueeze.default, aten.expand.default, aten._to_copy.default)
"""Operators that keep the indices of examples (`Rows`) intact."""


def microbatched(whole: Program, part: Program, count: int) -> Program:
    """The program of the first of `count` microbatches, made from `part`. Its inputs and tangents are the whole
    batch's, and its losses are terms of a mean. Both programs must be canonical.

    Raises SplitError if the whole batch's results do not follow from its microbatches'.
    """
    proof = _Proof(whole, count)
    proof.run(part)
    made = part.copy()
    for role, node in whole.inputs("input").items():
        _divide(made, made.inputs("input")[role], type_of(node), count)
    results, tangents = dict(made.results), made.inputs("tangent")
    for role, place in proof.outputs.items():
        tangent = tangents.get(role)
        if place == PARTIAL:
            value = results[f"output:{role}"]
            term = made.emit(aten.mul.Tensor, (value, count), before=_behind(made, value), like=note(value))
            results[f"output:{role}"] = term
        elif tangent is not None and isinstance(place, Shard):
            _divide(made, tangent, type_of(whole.inputs("tangent")[role]), count)
        elif tangent is not None:
            _share(made, tangent, count)
    made.set_results(results)
    return made


def _divide(program: Program, value: fx.Node, whole: Type, count: int) -> None:
    """Turn an input into the whole batch's, and read the microbatch from it."""
    part = type_of(value)
    if part == whole:
        return
    annotate(value, type=whole)
    microbatch = program.emit(MICROBATCH, (value, 0, count), before=_first_reader(program, value), like=_origin(value))
    if type_of(microbatch) != part:
        raise SplitError(f"{value.name} has another memory layout for the entire batch than for a microbatch")
    value.replace_all_uses_with(microbatch, lambda user: user is not microbatch)


def _share(program: Program, tangent: fx.Node, count: int) -> None:
    """Divide the gradient of a mean by the number of its terms."""
    dtype = tensor_type(tangent).dtype
    if dtype.itemsize < 4 and count & (count - 1):
        raise SplitError(
            f"dividing a loss in {dtype} by {count} microbatches is not exact; expected a power of 2, or a loss in "
            "float32"
        )
    share = program.emit(aten.div.Tensor, (tangent, count), before=_first_reader(program, tangent),
                         like=_origin(tangent))  # fmt: skip
    tangent.replace_all_uses_with(share, lambda user: user is not share)


def _origin(value: fx.Node) -> Note:
    return Note(phase="backward" if note(value).role.startswith("tangent:") else "forward")


def _first_reader(program: Program, value: fx.Node) -> fx.Node:
    phase = _origin(value).phase
    return next((node for node in program.computes if note(node).phase == phase), program.output)


def _behind(program: Program, value: fx.Node) -> fx.Node:
    first = next(node for node in program.graph.nodes if node.op != "placeholder")
    return first if value.op == "placeholder" else value.next


@dataclass
class _Proof:
    """Derives how values of the whole batch's forward follow from the microbatches'.

    Fields:
        whole: the program of the whole batch.
        count: the number of microbatches.
        found: the placements of each operator's results.
        drawn: values that do not differ by example but depend on numbers that every microbatch draws anew.
        pairs: for each value of the whole, the part's value that corresponds to it.
    """

    whole: Program
    count: int
    found: dict[fx.Node, tuple[Placement, ...]] = field(default_factory=dict)
    drawn: set[fx.Node] = field(default_factory=set)
    pairs: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, Placement]:
        return {role: self._place(node) for role, node in self.whole.results_of("output").items()}

    def run(self, part: Program) -> None:
        """Compare the forwards. Raises SplitError naming the operator that cannot be split."""
        self._inputs(part)
        steps = iter(_steps(part))
        for node in _forward(self.whole):
            if node.target is LAYOUT:
                self.found[node], self.pairs[node] = self.found[node.args[0]], self.pairs[node.args[0]]
                continue
            self._visit(node, next(steps, None))
        left = next(steps, None)
        if left is not None:
            raise self._error(left, "occurs only in the program of a microbatch")
        self._results()

    def _inputs(self, part: Program) -> None:
        for node, other in zip_longest(self.whole.placeholders, part.placeholders):
            if node is None or other is None or note(node).role != note(other).role:
                raise SplitError(
                    f"{(node or other).name} is read by only one of the programs for the entire batch and for a "
                    "microbatch"
                )
            self.pairs[node] = other
            self.found[node] = (self._input_place(node, other),)
        for name, value in self.whole.constants.items():
            other_value = part.constants.get(name)
            if other_value is None or not torch.equal(value, other_value):
                raise SplitError(f"the constant {name} depends on the number of examples")

    def _input_place(self, node: fx.Node, other: fx.Node) -> Placement:
        return REPLICATE if type_of(node) == type_of(other) else Shard(0)

    def _place(self, node: fx.Node) -> Placement:
        return self.found[node][0]

    # -- one operator ----------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node, other: fx.Node | None) -> None:
        if other is None or _kind(node) != _kind(other):
            text = "nothing" if other is None else target_text(other.target)
            raise self._error(node, f"is {text} in the program of a microbatch")
        operands = tensors(node)
        if [self.pairs[value] for value in operands] != [_resolved(value) for value in tensors(other)]:
            raise self._error(node, "reads other values in the program of a microbatch")
        self.pairs[node] = other
        if node.target is operator.getitem:
            self.found[node] = (self.found[operands[0]][node.args[1]],)
        else:
            self.found[node] = self._results_of(node, other, operands)
        self._check_types(node, other)
        divided = any(isinstance(place, Shard) for place in self.found[node])
        if (is_random(node) or self.drawn.intersection(operands)) and not divided:
            self.drawn.add(node)
        if is_random(node) and node.target not in DRAWS:
            raise self._error(node, "draws a number of random values that may depend on its input")

    def _results_of(self, node: fx.Node, other: fx.Node, operands: list[fx.Node]) -> tuple[Placement, ...]:
        places = tuple(map(self._place, operands))
        types = type_of(node)
        results = types if isinstance(types, tuple) else (types,)
        if node.target in FILLS or all(place == REPLICATE for place in places):
            return self._made(node, other, results)
        counts = any(isinstance(place, Rows) for place in places) and node.target in COUNTED
        known = tuple(Shard(p.dim) if isinstance(p, Rows) and counts else p for p in places)
        given = tuple(operand_type(type_of(operand)) for operand in operands)
        call = Call(node, given, results, known)  # type: ignore[arg-type]
        row = next((row for row in legal(call) if _is_met(row, known)), None)
        if row is None:
            raise self._error(node, f"mixes examples, or may mix them: its arguments lie {', '.join(map(str, places))}")
        means = MEAN in places
        if not self._alike(node, other):
            if not self._scales_by_count(node, other, places):
                raise self._error(node, "has another argument for fewer examples")
            means = True
        return tuple(self._lies(place, means, counts) for place in row.results)

    @staticmethod
    def _lies(place: Placement, means: bool, counts: bool) -> Placement:
        if isinstance(place, Partial):
            return MEAN if means else place
        return Rows(place.dim) if counts and isinstance(place, Shard) else place

    def _made(self, node: fx.Node, other: fx.Node, results: tuple[Type, ...]) -> tuple[Placement, ...]:
        """The placements of an operator that reads no example: the same for all, or as large as the batch and filled
        with one value."""
        dim = self._divided_dim(type_of(node), type_of(other))
        if dim == 0 and _counts_from_zero(node):
            return (Rows(0),)
        if not self._alike(node, other) or (dim is None and type_of(node) != type_of(other) and len(results) == 1):
            raise self._error(node, "has another argument for fewer examples")
        if dim is None:
            return (REPLICATE,) * len(results)
        broadcast = node.target is aten.expand.default and _is_broadcast(node, dim)
        if not (node.target in FILLS or is_random(node) or broadcast):
            raise self._error(node, "has one value per example that does not come from the examples")
        return (Shard(dim),)

    def _divided_dim(self, whole: Type, part: Type) -> int | None:
        """The only dimension in which the part is smaller, if it is so by the number of microbatches; else None."""
        if not isinstance(whole, TensorType) or not isinstance(part, TensorType) or len(whole.shape) != len(part.shape):
            return None
        other = [i for i, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
        return other[0] if len(other) == 1 and whole.shape[other[0]] == self.count * part.shape[other[0]] else None

    def _alike(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether the non-tensor arguments are equal but for sizes, which are compared in the types of the results."""
        pairs = zip_longest(_plain(node), _plain(other))
        if node.target is aten.slice.Tensor and _is_everything(node) and _is_everything(other):
            return True
        if node.target is aten.native_group_norm.default:  # (x, weight, bias, examples, channels, ...)
            return node.args[4:] == other.args[4:]
        sized = node.target in SIZED
        return all(a == b or (sized and isinstance(a, list) and isinstance(b, list)) for a, b in pairs)

    def _scales_by_count(self, node: fx.Node, other: fx.Node, places: tuple[Placement, ...]) -> bool:
        """Whether the operator divides a sum over examples by a number that grows with them, which makes its terms
        those of a mean."""
        if places != (PARTIAL,) or node.kwargs or len(node.args) != 2:
            return False
        a, b = node.args[1], other.args[1]
        if node.target in (aten.div.Tensor, aten.div.Scalar):
            return a == self.count * b
        return node.target in (aten.mul.Tensor, aten.mul.Scalar) and b == self.count * a

    def _check_types(self, node: fx.Node, other: fx.Node) -> None:
        whole, part = type_of(node), type_of(other)
        wholes, parts = (t if isinstance(t, tuple) else (t,) for t in (whole, part))
        for place, a, b in zip(self.found[node], wholes, parts, strict=True):
            if a is None or not isinstance(a, TensorType) or not isinstance(b, TensorType):
                continue
            expected = list(a.shape)
            if isinstance(place, Shard):
                expected[place.dim] //= self.count
            if tuple(expected) != b.shape or a.dtype != b.dtype:
                raise self._error(node, f"is {a} for the entire batch and {b} for a microbatch, where it lies {place}")

    # -- the end -------------------------------------------------------------------------------------------

    def _results(self) -> None:
        for role, node in self.whole.results.items():
            kind, _, name = role.partition(":")
            if kind == "gradient":
                continue
            place, found = self._place(node), type_of(node)
            is_number = isinstance(found, TensorType) and found.shape == () and found.dtype.is_floating_point
            legal = place == Shard(0) or (isinstance(place, Partial) and is_number)
            if node not in self.drawn and (place == REPLICATE or (kind == "output" and legal)):
                continue
            what = f"the buffer {name}" if kind == "mutation" else f"output {name}"
            raise self._error(
                node,
                f"makes {what}, which lies {place}: expected examples along its first dimension, one float over all of "
                "them, or a value that is the same for all",
            )
        random = next(
            (node for node in self.whole.computes if note(node).phase == "backward" and is_random(node)), None
        )
        if random is not None:
            raise self._error(random, "draws random numbers in the backward")

    def _error(self, node: fx.Node, why: str) -> SplitError:
        where = note(node).module or "the model"
        source = self.whole.sources.get(note(node).module, "")
        what = target_text(node.target) if node.op == "call_function" else node.name
        return SplitError(f"{where}{f' ({source})' if source else ''}: {what} {why}")


def _forward(program: Program) -> list[fx.Node]:
    return [node for node in program.computes if note(node).phase == "forward"]


def _steps(program: Program) -> Iterator[fx.Node]:
    return (node for node in _forward(program) if node.target is not LAYOUT)


def _kind(node: fx.Node) -> Any:
    return SAME.get(node.target, node.target)


def _resolved(node: fx.Node) -> fx.Node:
    return _resolved(node.args[0]) if node.target is LAYOUT else node


def _plain(node: fx.Node) -> list[Any]:
    """The arguments of a call that hold no tensors."""
    values = [*node.args, *(node.kwargs[key] for key in sorted(node.kwargs))]
    return [value for value in values if not _holds_tensors(value)]


def _holds_tensors(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, fx.Node) for item in items)


def _is_everything(node: fx.Node) -> bool:
    return tensor_type(node).shape == tensor_type(node.args[0]).shape


def _is_broadcast(node: fx.Node, dim: int) -> bool:
    source = tensor_type(node.args[0]).shape
    own = dim - len(tensor_type(node).shape) + len(source)
    return own < 0 or source[own] == 1


def _counts_from_zero(node: fx.Node) -> bool:
    return node.target is aten.arange.default or (node.target is aten.arange.start and node.args[0] == 0)


def _is_met(row: Row, found: tuple[Placement, ...]) -> bool:
    """Whether the arguments are placed as a row wants them. A value that is the same for all is a term of a mean as it
    is."""
    averages = MEAN in found
    if averages and PARTIAL in found:
        return False
    lie = [PARTIAL if place == MEAN or (averages and place == REPLICATE and wanted == PARTIAL) else place
           for wanted, place in zip(row.inputs, found, strict=True)]  # fmt: skip
    return tuple(lie) == row.inputs
