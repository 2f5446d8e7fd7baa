"""Lowers a program of whole tensors to one of local shards, operator by operator: the engine of the shard pass."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf, prod
from typing import Any

import torch
from torch import fx

from ...runtime.isa.errors import ShardingError
from ...runtime.isa.instructions import ALL_GATHER, ALL_REDUCE, FORK_RNG, LOCAL, REDUCE_SCATTER, SWAP_RNG
from ...runtime.isa.mesh import PARTIAL, REPLICATE, Axis, Placement, Placements, Shard, local_shape, placements_text
from ..program.program import Program, annotate, is_random, note, type_of
from ..program.types import TensorType, Type
from .modes import Role
from .rules import Call, Row, operand_type, rule_for, squeezed_dims, tensors, whole

aten = torch.ops.aten

SHAPED: dict[Any, int] = {
    aten.view.default: 1, aten._unsafe_view.default: 1, aten.reshape.default: 1, aten.expand.default: 1,
}  # fmt: skip
"""Operators that take the shape of their result, with the position of that argument."""

SOURCE_SHAPED = (aten.slice_backward.default, aten.select_backward.default)
"""Backward operators whose argument 1 is the shape of the forward's input, which is also their result's."""

SQUEEZES = dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), aten.squeeze.dims)
"""Squeezes are lowered with explicit dimensions: a shard loses those that the whole loses, and keeps others of size
1."""


@dataclass(frozen=True)
class Value:
    """An old value in the new program: this rank's shard, and the placements of all shards."""

    node: fx.Node
    placements: Placements


def divides(shape: tuple[int, ...], placements: Sequence[Placement], axes: tuple[Axis, ...]) -> bool:
    """Whether every rank gets an equal shard. The placements are those on the first axes. Shards of one dimension nest
    in the order of the axes: each axis cuts every section of what the axes before it left."""
    sizes = list(shape)
    for placement, axis in zip(placements, axes, strict=False):
        if isinstance(placement, Shard):
            if sizes[placement.dim] % (placement.sections * axis.size):
                return False
            sizes[placement.dim] //= axis.size
    return True


class Sharder:
    """State of one lowering. `types` are the unsharded types of the old program's values."""

    def __init__(self, program: Program, axes: tuple[Axis, ...], roles: Mapping[str, Role]) -> None:
        self.program = program
        self.axes = axes
        self.roles = tuple(roles[axis.name] for axis in axes)
        # Recorded now, because parameters' notes are later overwritten with their shards' types.
        self.types: dict[fx.Node, Type] = {node: operand_type(type_of(node)) for node in program.nodes}
        self.values: dict[fx.Node, Value] = {}
        self.elements: dict[fx.Node, tuple[Value, ...]] = {}  # of operators with several results
        self.weights: set[fx.Node] = set()  # parameters, and values computed from them alone
        self.wanted: dict[fx.Node, Placements] = {}  # how values that become gradients should be placed
        self.everywhere = (REPLICATE,) * len(axes)
        # Redistributed values, keyed by phase: if the backward reused a tensor that the forward gathered, it would stay
        # in memory until then.
        self._moved: dict[tuple[fx.Node, Placements, str], fx.Node] = {}
        self.at: fx.Node  # the old operator that is being lowered

    # -- reading -------------------------------------------------------------------------------------------

    def type(self, node: fx.Node) -> TensorType:
        found = self.types[node]
        assert isinstance(found, TensorType)
        return found

    def placements(self, node: fx.Node) -> Placements:
        return self.values[node].placements

    def local(self, node: fx.Node, placements: Placements) -> fx.Node:
        """This rank's shard of an old value under `placements`, redistributed if it is placed differently."""
        value = self.values[node]
        if value.placements == placements:
            return value.node
        key = value.node, placements, note(self.at).phase
        if key not in self._moved:
            self._moved[key] = self._move(value, placements)
        if PARTIAL in value.placements and PARTIAL not in placements:
            self.values[node] = Value(self._moved[key], placements)  # each sum is computed once
        return self._moved[key]

    def settled(self, node: fx.Node) -> Placements:
        """The placements of a value once its partial sums are reduced."""
        return self.resolved(self.placements(node), self.type(node).shape)

    # -- writing -------------------------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit a node of the new program in front of the old one being lowered."""
        return self.program.emit(target, args, kwargs, before=self.at, like=note(self.at))

    def set(self, node: fx.Node, made: fx.Node, placements: Placements) -> None:
        """Let `made` stand for the old value `node`."""
        self.values[node] = self.value(made, placements)

    def value(self, made: fx.Node, placements: Placements) -> Value:
        """A new node with its placements, which are also noted on the node."""
        annotate(made, placement=placements_text(placements, self.axes))
        return Value(made, placements)

    def all_reduce(self, local: fx.Node, axes: list[Axis], reduction: str = "sum") -> fx.Node:
        for axis in axes:
            local = self.emit(ALL_REDUCE, local, axis.name, reduction)
        return local

    def sharding_axes(self, placements: Placements, dim: int) -> list[Axis]:
        """The axes that shard a dimension."""
        pairs = zip(placements, self.axes, strict=True)
        return [axis for placement, axis in pairs if isinstance(placement, Shard) and placement.dim == dim]

    def resolved(self, placements: Placements, shape: tuple[int, ...]) -> Placements:
        """The placements of a partial tensor once its sums are reduced, as the roles of the axes say."""
        found = list(placements)
        for i, (placement, role) in enumerate(zip(placements, self.roles, strict=True)):
            if placement == PARTIAL:
                # A reduce-scatter moves half of what an all-reduce does and leaves less to keep: use it wherever the
                # axis's role names a dimension and that dimension divides.
                dims = {"batch": 0, "sequence": 1 if len(shape) == 3 else None, "hidden": len(shape) - 1}
                dim = dims.get(role.partial)
                found[i] = REPLICATE if dim is None or not shape else Shard(dim)
                if not divides(shape, found, self.axes):
                    found[i] = REPLICATE
        return tuple(found)

    # -- collective ------------------------------------------------------------------------------------------

    def _move(self, value: Value, target: Placements) -> fx.Node:
        """Redistribute axis by axis. Shards of a dimension nest in the order of the axes, so an axis is gathered after
        the later ones that share its dimension, and sharded before them. Plain all-reduces come last, when shards are
        smallest."""
        local, now = value.node, list(value.placements)
        shares = [self._conflicts(now, target, i) for i in range(len(now))]
        for i in reversed(range(len(now))):
            if isinstance(now[i], Shard) and (now[i] != target[i] or shares[i]):
                local, now[i] = self._gather(local, now[i], self.axes[i]), REPLICATE  # type: ignore[arg-type]
                annotate(local, placement=placements_text(tuple(now), self.axes))
        for i in sorted(range(len(now)), key=lambda i: now[i] == PARTIAL and not isinstance(target[i], Shard)):
            wanted, axis = target[i], self.axes[i]
            if now[i] == wanted:
                continue
            if now[i] == PARTIAL and isinstance(wanted, Shard) and wanted.sections == 1:
                local = self.emit(REDUCE_SCATTER, local, wanted.dim, axis.name, axis.size)
            elif now[i] == PARTIAL:
                local = self.emit(ALL_REDUCE, local, axis.name, "sum")
                local = self._take(local, wanted, axis)
            else:
                local = self._take(local, wanted, axis)
            now[i] = wanted
            annotate(local, placement=placements_text(tuple(now), self.axes))
        return local

    def _conflicts(self, now: list[Placement], target: Placements, place: int) -> bool:
        """Whether an axis must be gathered because an earlier axis that shards the same dimension changes."""
        mine = now[place]
        if not isinstance(mine, Shard):
            return False
        for before in range(place):
            changes = now[before] != target[before]
            touches = any(isinstance(p, Shard) and p.dim == mine.dim for p in (now[before], target[before]))
            if changes and touches:
                return True
        return False

    def _gather(self, local: fx.Node, shard: Shard, axis: Axis) -> fx.Node:
        gather = lambda piece: self.emit(ALL_GATHER, piece, shard.dim, axis.name, axis.size)  # noqa: E731
        return self._by_section(local, shard, gather)

    def _take(self, local: fx.Node, wanted: Placement, axis: Axis) -> fx.Node:
        if not isinstance(wanted, Shard):
            return local
        take = lambda piece: self.emit(LOCAL, piece, wanted.dim, axis.name, axis.size)  # noqa: E731
        return self._by_section(local, wanted, take)

    def _by_section(self, local: fx.Node, shard: Shard, action: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Applies `action` to each section of a shard and concatenates the results."""
        if shard.sections == 1:
            return action(local)
        size = type_of(local).shape[shard.dim] // shard.sections  # type: ignore[union-attr]
        bounds = ((i * size, (i + 1) * size) for i in range(shard.sections))
        pieces = [self.emit(aten.slice.Tensor, local, shard.dim, *bound) for bound in bounds]
        return self.emit(aten.cat.default, [action(piece) for piece in pieces], shard.dim)

    # -- choosing ------------------------------------------------------------------------------------------

    def choose(
        self, node: fx.Node, operands: list[fx.Node], target: Any = None
    ) -> tuple[list[Placements], list[Placements]]:
        """The placements of an operator's arguments and of its results: on each axis the legal row that moves the
        fewest elements. `target` is an operator whose rule is used instead of the node's own."""
        results = self.types[node]
        types = results if isinstance(results, tuple) else (results,)
        rows: list[Row] = []
        # Choose axis by axis, although the best rows of each axis need not be the best together: there are as many
        # combinations as rows to the power of axes, for every operator of the program.
        for i in range(len(self.axes)):
            found = tuple(self.settled(operand)[i] for operand in operands)
            call = Call(node, tuple(map(self.type, operands)), types, found)  # type: ignore[arg-type]
            rule = rule_for(target or node.target)
            legal = [row for row in [whole(call), *(rule(call) if rule else [])] if self._divides(call, row, rows)]
            # Among rows of equal cost the first wins, and `whole` comes first: sharding what all ranks have is free,
            # but gathering it again is not.
            best = min(legal, key=lambda row: self._cost(call, operands, row, i))
            self._check_heads(call, best, i)
            rows.append(best)
        inputs = [tuple(row.inputs[j] for row in rows) for j in range(len(operands))]
        return inputs, [tuple(row.results[j] for row in rows) for j in range(len(types))]

    def _divides(self, call: Call, row: Row, before: list[Row]) -> bool:
        """Whether all tensors of a call divide evenly under this row and the rows of the axes before."""
        rows = [*before, row]
        inputs = ((type, [r.inputs[j] for r in rows]) for j, type in enumerate(call.operands))
        results = ((type, [r.results[j] for r in rows]) for j, type in enumerate(call.results) if type)
        return all(divides(type.shape, placements, self.axes) for type, placements in chain(inputs, results))

    def _cost(self, call: Call, operands: list[fx.Node], row: Row, place: int) -> float:
        """Elements that a row moves along an axis; infinite if the axis's role forbids the row."""
        role, axis = self.roles[place], self.axes[place]
        # What each rank receives in a ring: gathering or reduce-scattering n elements brings all but its own shard. An
        # all-reduce does one after the other, and counts twice in `_moves`.
        ranks = (axis.size - 1) / axis.size
        cost = 0.0
        for operand, type, wanted in zip(operands, call.operands, row.inputs, strict=True):
            found = self.placements(operand)[place]
            # The mode alone decides which weights are gathered, however cheap that would be here.
            if self.is_weight(operand) and not self._may_move(role, found, wanted):
                return inf
            cost += ranks * prod(type.shape) * self._moves(found, self.settled(operand)[place], wanted)
        # The operator that makes a partial sum pays for its reduction, at the price of a reduce-scatter, although it
        # happens only in front of a reader. Operators that pass partial sums on, such as views, do not pay again, nor
        # do those that are asked for partial sums.
        wanted_here = self.wanted.get(call.node)
        for result, placement in zip(call.results, row.results, strict=True):
            is_asked_for = wanted_here is not None and wanted_here[place] == PARTIAL
            if placement == PARTIAL and PARTIAL not in row.inputs and result is not None and not is_asked_for:
                cost += ranks * prod(result.shape)
        if call.node.target is aten.t.default and PARTIAL in row.inputs and call.node not in self.wanted:
            return inf  # a transposed factor has another reader besides its own product: let them share the sum
        # A gradient ends up placed like its parameter. Made in another placement, it would be redistributed at once.
        if wanted_here is not None and row.results[0] not in (PARTIAL, wanted_here[place]):
            return inf
        return cost

    def is_weight(self, node: fx.Node) -> bool:
        # Vectors, such as biases and norm weights, are too small to follow a rule: they are redistributed as needed.
        return node in self.weights and len(self.type(node).shape) > 1

    @staticmethod
    def _may_move(role: Role, found: Placement, wanted: Placement) -> bool:
        """Whether the role allows a weight to be read as `wanted`: gathered on axes that gather, unchanged on all
        others."""
        return wanted == REPLICATE if role.gathered else found == wanted

    @staticmethod
    def _moves(found: Placement, settled: Placement, wanted: Placement) -> float:
        """How many times a tensor's elements cross the axis."""
        if found == wanted:
            return 0.0
        if wanted == PARTIAL:  # a whole tensor is never split into terms
            return inf
        if found == REPLICATE:  # each rank already has the shard
            return 0.0
        if found == PARTIAL:  # reduce-scattered only as `resolved` would, so that other readers find it
            return 2.0 if wanted == REPLICATE else 1.0 if wanted == settled else inf
        # Moving a shard to another dimension gathers and cuts it, which costs more than reading the gathered tensor.
        return 1.0 if wanted == REPLICATE else 2.0

    def _check_heads(self, call: Call, best: Row, place: int) -> None:
        """Raises ShardingError if a sharded hidden dimension is viewed as heads that do not divide by the axis's
        ranks."""
        if call.node.target not in SHAPED or not isinstance(call.found[0], Shard) or best.inputs[0] != REPLICATE:
            return
        shape, seen, axis = call.operands[0].shape, self.type(call.node).shape, self.axes[place]
        if call.found[0].dim == len(shape) - 1 and len(seen) > len(shape):
            raise ShardingError(
                f"{note(call.node).module or call.node.name}: a hidden dimension of {shape[-1]}, sharded over the "
                f"{axis.size} ranks of axis {axis.name}, is viewed as {list(seen)}, whose number of heads is not "
                f"divisible by {axis.size}; choose a size= for parallel['tensor'] that divides every number of heads"
            )

    # -- operators -----------------------------------------------------------------------------------------

    def lower(self, node: fx.Node) -> None:
        """Lower one operator by its rule."""
        if node.target is operator.getitem:
            self.values[node] = self.elements[node.args[0]][node.args[1]]
            return
        operands = tensors(node)
        inputs, results = self.choose(node, operands)
        shards = iter([self.local(operand, placements) for operand, placements in zip(operands, inputs, strict=True)])
        args = list(fx.map_arg(node.args, lambda _: next(shards)))
        kwargs = fx.map_arg(node.kwargs, lambda _: next(shards))
        # Arguments that hold sizes of the whole tensor become those of the shard.
        if node.target in SHAPED:
            args[SHAPED[node.target]] = list(local_shape(self.type(node).shape, results[0], self.axes))
        elif node.target in SOURCE_SHAPED:
            args[1] = list(local_shape(tuple(args[1]), results[0], self.axes))
        elif node.target is aten.split.Tensor or node.target is aten.split_with_sizes.default:
            args[1] = self._local_sizes(node, results[0])
        elif node.target in SQUEEZES:
            args = [args[0], squeezed_dims(node, self.type(operands[0]).shape)]
        apart = [axis.name for axis, p in zip(self.axes, results[0], strict=True) if isinstance(p, Shard)]
        # Ranks with different shards must draw different numbers, ranks with the same shard the same.
        fork = self._fork(args, apart) if apart and is_random(node) else None
        made = self._emit_view(SQUEEZES.get(node.target, node.target), args, kwargs)
        if fork is not None:
            self.emit(SWAP_RNG, fork)
        made = self._share_of_mean(node, made, inputs)
        self.finish(node, made, results)

    def _fork(self, args: list[Any], axes: list[str]) -> fx.Node:
        """Swap in a generator state that differs between shards along these axes and is equal for equal shards. Returns
        the state to swap back after the draw."""
        fork = self.emit(FORK_RNG, next(arg for arg in args if isinstance(arg, fx.Node)), axes)
        self.emit(SWAP_RNG, fork)
        return fork

    def finish(self, node: fx.Node, made: fx.Node, results: list[Placements]) -> None:
        """Let the results of `made` stand for those of the old operator `node`."""
        if not isinstance(self.types[node], tuple):
            self.set(node, made, results[0])
            return
        types = self.types[node]
        # Take out only elements that somebody reads: the others would be dead code.
        wanted = {user.args[1] for user in node.users}
        elements = []
        for i, placements in enumerate(results):
            if i not in wanted or types[i] is None:  # type: ignore[index]
                elements.append(Value(made, placements))
                continue
            element = self.emit(operator.getitem, made, i)
            elements.append(self.value(element, placements))
        self.elements[node] = tuple(elements)

    def _emit_view(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
        """Emit the operator on local shards; a view that a shard's strides do not allow reads a contiguous copy."""
        try:
            return self.emit(target, *args, **kwargs)
        except (RuntimeError, ValueError):
            if target not in SHAPED:
                raise
            args[0] = self.emit(aten.clone.default, args[0], memory_format=torch.contiguous_format)
            return self.emit(target, *args, **kwargs)

    def _local_sizes(self, node: fx.Node, placements: Placements) -> Any:
        sizes, ndim = node.args[1], len(self.type(node.args[0]).shape)
        dim = (node.args[2] if len(node.args) > 2 else 0) % ndim
        ranks = prod(axis.size for axis in self.sharding_axes(placements, dim))
        return sizes // ranks if isinstance(sizes, int) else [size // ranks for size in sizes]

    def _share_of_mean(self, node: fx.Node, made: fx.Node, inputs: list[Placements]) -> fx.Node:
        """Divide a mean over a sharded dimension by the number of ranks that shard it, so that the results sum to the
        mean."""
        if node.target not in (aten.mean.dim, aten.mean.default):
            return made
        ndim = len(self.type(node.args[0]).shape)
        dims = {d % ndim for d in node.args[1]} if node.target is aten.mean.dim else set(range(ndim))
        ranks = prod(axis.size for dim in dims for axis in self.sharding_axes(inputs[0], dim))
        return made if ranks == 1 else self.emit(aten.div.Scalar, made, ranks)


Lowering = Callable[[Sharder, fx.Node], None]
"""Lowers one operator whose computation on local shards differs from that on the whole."""
