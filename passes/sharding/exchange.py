"""Where an exchange may stand, and how it is written out in two: its start, and what waits for it.

Processes exchange consecutive memory, part behind part. What is exchanged along another dimension than the first, or
together with others, is laid out anew by operators of the program, so that its memory is planned like any other's.
"""

import operator
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import fx

from ...runtime.isa.instructions import (
    ALL_GATHER,
    ALL_REDUCE,
    EXCHANGES,
    FINISH_EXCHANGE,
    START_ALL_GATHER,
    START_ALL_REDUCE,
    START_REDUCE_SCATTER,
    SWAP_RNG,
)
from ..program.program import Program, aliased_inputs, annotate, note, tensor_type, writes
from ..program.types import contiguous_stride

aten = torch.ops.aten


def stretches_of(program: Program) -> dict[fx.Node, int]:
    """Numbers the stretches in which nothing is overwritten: there is nothing there that exchanges must not pass."""
    found, number = {}, 0
    for node in program.graph.nodes:
        number += node.op != "placeholder" and writes(node) and node.target is not SWAP_RNG
        found[node] = number
    return found


def first_readers(program: Program) -> dict[fx.Node, int]:
    """The place where each value is first read, by more than a view or another exchange."""
    order, found = program.positions(), dict[fx.Node, int]()
    for node in reversed(order):
        for user in node.users:
            passes_on = user.target in EXCHANGES or node in aliased_inputs(user)
            place = found[user] if passes_on else order[user]
            found[node] = min(place, found.get(node, place))
        found.setdefault(node, order[node])
    return found


class Writer:
    """Writes in front of `at`."""

    def __init__(self, program: Program, at: fx.Node) -> None:
        self.program = program
        self.at = at
        self.origin = note(at)

    def start(self, members: list[fx.Node]) -> fx.Node:
        """The start of an exchange, or of several sums at once. What it fills is read by `finish` alone."""
        first = members[0]
        self.origin = note(first)
        if first.target is ALL_REDUCE:
            part = self._own(first) if len(members) == 1 else self._joined(members)
            return self._emit(START_ALL_REDUCE, part, *first.args[1:])
        part, dim, axis, size = first.args
        if first.target is ALL_GATHER:
            return self._emit(START_ALL_GATHER, self._contiguous(part), axis, size)
        return self._emit(START_REDUCE_SCATTER, self._by_part(part, dim, size), axis, size)

    def finish(self, started: fx.Node, members: list[fx.Node]) -> list[fx.Node]:
        """What stands for each of the exchanges from here on."""
        first = members[0]
        self.origin = note(first)
        if first.target is ALL_REDUCE:
            whole = self._emit(FINISH_EXCHANGE, started)
            values = [whole] if len(members) == 1 else self._apart(whole, members)
        else:
            values = [self._emit(FINISH_EXCHANGE, started, started.args[0])]
        if first.target is ALL_GATHER:
            values = [self._along(values[0], *first.args)]
        for member, value in zip(members, values, strict=True):
            annotate(value, placement=note(member).placement)
        return values

    def _emit(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self.program.emit(target, args, kwargs, before=self.at, like=self.origin)  # type: ignore[arg-type]

    # -- gathers and scattered sums ------------------------------------------------------------------------

    def _contiguous(self, part: fx.Node) -> fx.Node:
        return part if is_contiguous(part) else self._copy(part)

    def _copy(self, part: fx.Node) -> fx.Node:
        return self._emit(aten.clone.default, part, memory_format=torch.contiguous_format)

    def _by_part(self, part: fx.Node, dim: int, size: int) -> fx.Node:
        """Every process's part of a tensor behind the other, along the first dimension."""
        if dim == 0:
            return self._contiguous(part)
        shape = list(tensor_type(part).shape)
        shape[dim] //= size
        split = self._emit(aten.view.default, part, [*shape[:dim], size, *shape[dim:]])
        order = [dim, *(i for i in range(len(shape) + 1) if i != dim)]
        parts = self._contiguous(self._emit(aten.permute.default, split, order))
        return self._emit(aten.view.default, parts, [size * shape[0], *shape[1:]])

    def _along(self, whole: fx.Node, part: fx.Node, dim: int, axis: str, size: int) -> fx.Node:
        """The inverse: of parts along the first dimension the whole along `dim`."""
        if dim == 0:
            return whole
        shape = list(tensor_type(part).shape)
        parts = self._emit(aten.view.default, whole, [size, *shape])
        order = [*range(1, dim + 1), 0, *range(dim + 1, len(shape) + 1)]
        laid_out = self._contiguous(self._emit(aten.permute.default, parts, order))
        shape[dim] *= size
        return self._emit(aten.view.default, laid_out, shape)

    # -- sums ----------------------------------------------------------------------------------------------

    def _own(self, exchange: fx.Node) -> fx.Node:
        """The terms of a sum, in memory that it may overwrite."""
        part = exchange.args[0]
        return part if is_contiguous(part) and is_own(part, exchange) else self._copy(part)

    def _joined(self, members: list[fx.Node]) -> fx.Node:
        """Terms of several sums as one flat tensor."""
        parts = [self._contiguous(member.args[0]) for member in members]
        return self._emit(aten.cat.default, [self._view(part, [prod(tensor_type(part).shape)]) for part in parts])

    def _apart(self, whole: fx.Node, members: list[fx.Node]) -> list[fx.Node]:
        """The inverse."""
        shapes = [list(tensor_type(member).shape) for member in members]
        bounds = pairwise([0, *accumulate(map(prod, shapes))])
        pieces = [self._emit(aten.slice.Tensor, whole, 0, *bound) for bound in bounds]
        return [self._view(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _view(self, value: fx.Node, shape: list[int]) -> fx.Node:
        return value if list(tensor_type(value).shape) == shape else self._emit(aten.view.default, value, shape)


def is_contiguous(node: fx.Node) -> bool:
    found = tensor_type(node)
    return found.stride == contiguous_stride(found.shape)


def is_own(part: fx.Node, reader: fx.Node) -> bool:
    """Whether nobody but `reader` ever reads a value's storage."""
    fresh = part.op == "call_function" and part.target is not operator.getitem and list(part.users) == [reader]
    return fresh and all(is_own(source, part) for source in aliased_inputs(part))
