"""Where a collective may move to, and how it is split into a start and a finish.

Processes exchange contiguous memory, shard after shard. A tensor exchanged along another dimension than the first, or
together with others, is laid out for that by operators of the program, so that its memory is planned like any other.
"""

import operator
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import fx

from ...runtime.isa.instructions import (
    ALL_GATHER,
    ALL_REDUCE,
    COLLECTIVES,
    FINISH_COLLECTIVE,
    START_ALL_GATHER,
    START_ALL_REDUCE,
    START_REDUCE_SCATTER,
    SWAP_RNG,
)
from ...runtime.isa.layout import contiguous_stride
from ..program.program import Program, aliased_inputs, annotate, note, tensor_type, writes

aten = torch.ops.aten


def write_epochs(program: Program) -> dict[fx.Node, int]:
    """How many writing nodes precede each node. Collectives may move freely within one such epoch."""
    found, number = {}, 0
    for node in program.graph.nodes:
        number += node.op != "placeholder" and writes(node) and node.target is not SWAP_RNG
        found[node] = number
    return found


def first_readers(program: Program) -> dict[fx.Node, int]:
    """The position at which each value is first read, looking through views and other collectives."""
    order, found = program.positions(), dict[fx.Node, int]()
    for node in reversed(order):
        for user in node.users:
            passes_on = user.target in COLLECTIVES or node in aliased_inputs(user)
            place = found[user] if passes_on else order[user]
            found[node] = min(place, found.get(node, place))
        found.setdefault(node, order[node])
    return found


class Writer:
    """Emits starts and finishes of collectives in front of `at`."""

    def __init__(self, program: Program, at: fx.Node) -> None:
        self.program = program
        self.at = at
        self.origin = note(at)

    def start(self, members: list[fx.Node]) -> fx.Node:
        """Emit the start of a collective, or of several all-reduces at once. Only `finish` may read the buffer that it
        fills."""
        first = members[0]
        self.origin = note(first)
        if first.target is ALL_REDUCE:
            shard = self._own(first) if len(members) == 1 else self._joined(members)
            return self._emit(START_ALL_REDUCE, shard, *first.args[1:])
        shard, dim, axis, size = first.args
        if first.target is ALL_GATHER:
            return self._emit(START_ALL_GATHER, self._contiguous(shard), axis, size)
        return self._emit(START_REDUCE_SCATTER, self._by_shard(shard, dim, size), axis, size)

    def finish(self, started: fx.Node, members: list[fx.Node]) -> list[fx.Node]:
        """Emit the finish. Returns the value that replaces each of the collectives."""
        first = members[0]
        self.origin = note(first)
        if first.target is ALL_REDUCE:
            whole = self._emit(FINISH_COLLECTIVE, started)
            values = [whole] if len(members) == 1 else self._apart(whole, members)
        else:
            values = [self._emit(FINISH_COLLECTIVE, started, started.args[0])]
        if first.target is ALL_GATHER:
            values = [self._along(values[0], *first.args)]
        for member, value in zip(members, values, strict=True):
            annotate(value, placement=note(member).placement)
        return values

    def _emit(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self.program.emit(target, args, kwargs, before=self.at, like=self.origin)  # type: ignore[arg-type]

    # -- gathers and scattered sums ------------------------------------------------------------------------

    def _contiguous(self, shard: fx.Node) -> fx.Node:
        return shard if is_contiguous(shard) else self._copy(shard)

    def _copy(self, shard: fx.Node) -> fx.Node:
        return self._emit(aten.clone.default, shard, memory_format=torch.contiguous_format)

    def _by_shard(self, shard: fx.Node, dim: int, size: int) -> fx.Node:
        """A tensor laid out shard after shard along the first dimension, for a reduce-scatter along `dim`."""
        if dim == 0:
            return self._contiguous(shard)
        shape = list(tensor_type(shard).shape)
        shape[dim] //= size
        split = self._emit(aten.view.default, shard, [*shape[:dim], size, *shape[dim:]])
        order = [dim, *(i for i in range(len(shape) + 1) if i != dim)]
        shards = self._contiguous(self._emit(aten.permute.default, split, order))
        return self._emit(aten.view.default, shards, [size * shape[0], *shape[1:]])

    def _along(self, whole: fx.Node, shard: fx.Node, dim: int, axis: str, size: int) -> fx.Node:
        """The inverse of `_by_shard`: from shards along the first dimension to the whole along `dim`."""
        if dim == 0:
            return whole
        shape = list(tensor_type(shard).shape)
        shards = self._emit(aten.view.default, whole, [size, *shape])
        order = [*range(1, dim + 1), 0, *range(dim + 1, len(shape) + 1)]
        laid_out = self._contiguous(self._emit(aten.permute.default, shards, order))
        shape[dim] *= size
        return self._emit(aten.view.default, laid_out, shape)

    # -- sums ----------------------------------------------------------------------------------------------

    def _own(self, collective: fx.Node) -> fx.Node:
        """The input of an all-reduce, in memory that it may overwrite."""
        shard = collective.args[0]
        return shard if is_contiguous(shard) and is_own(shard, collective) else self._copy(shard)

    def _joined(self, members: list[fx.Node]) -> fx.Node:
        """The inputs of several all-reduces as one flat tensor."""
        shards = [self._contiguous(member.args[0]) for member in members]
        return self._emit(aten.cat.default, [self._view(shard, [prod(tensor_type(shard).shape)]) for shard in shards])

    def _apart(self, whole: fx.Node, members: list[fx.Node]) -> list[fx.Node]:
        """The inverse of `_joined`."""
        shapes = [list(tensor_type(member).shape) for member in members]
        bounds = pairwise([0, *accumulate(map(prod, shapes))])
        pieces = [self._emit(aten.slice.Tensor, whole, 0, *bound) for bound in bounds]
        return [self._view(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _view(self, value: fx.Node, shape: list[int]) -> fx.Node:
        return value if list(tensor_type(value).shape) == shape else self._emit(aten.view.default, value, shape)


def is_contiguous(node: fx.Node) -> bool:
    found = tensor_type(node)
    return found.stride == contiguous_stride(found.shape)


def is_own(shard: fx.Node, reader: fx.Node) -> bool:
    """Whether only `reader` ever reads the storage of a value."""
    fresh = shard.op == "call_function" and shard.target is not operator.getitem and list(shard.users) == [reader]
    return fresh and all(is_own(source, shard) for source in aliased_inputs(shard))
