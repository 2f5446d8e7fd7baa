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
"""Operators that name the shape of their result, and the place of that argument."""

SOURCE_SHAPED = (aten.slice_backward.default, aten.select_backward.default)
"""Backwards that name the shape of the forward's argument, which is their result's."""

SQUEEZES = dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), aten.squeeze.dims)
"""Of a shard they take away the dimensions that they do of the whole, and not others that are of size 1 in shards."""


@dataclass(frozen=True)
class Value:
    """What stands in the new program for one of the old: this rank's shard, and how all shards lie."""

    node: fx.Node
    placements: Placements


def divides(shape: tuple[int, ...], placements: Sequence[Placement], axes: tuple[Axis, ...]) -> bool:
    """Whether every rank has an equal shard, by placements on the first axes. Shards of a dimension nest in the order
    of the axes: an axis cuts each of its sections of what those before it left."""
    sizes = list(shape)
    for placement, axis in zip(placements, axes, strict=False):
        if isinstance(placement, Shard):
            if sizes[placement.dim] % (placement.sections * axis.size):
                return False
            sizes[placement.dim] //= axis.size
    return True


class Sharder:
    """State of one lowering. `types` are the whole types of the old program's values."""

    def __init__(self, program: Program, axes: tuple[Axis, ...], roles: Mapping[str, Role]) -> None:
        self.program = program
        self.axes = axes
        self.roles = tuple(roles[axis.name] for axis in axes)
        # Taken now: annotations of parameters are overwritten by those of their shards.
        self.types: dict[fx.Node, Type] = {node: operand_type(type_of(node)) for node in program.nodes}
        self.values: dict[fx.Node, Value] = {}
        self.elements: dict[fx.Node, tuple[Value, ...]] = {}  # of operators with several results
        self.weights: set[fx.Node] = set()  # parameters, and what is made of them alone
        self.wanted: dict[fx.Node, Placements] = {}  # how what becomes a gradient should lie
        self.everywhere = (REPLICATE,) * len(axes)
        # Collectives by phase: what the forward gathered would live until the backward if that read it again.
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
        """This rank's shard of an old value, lying by `placements`: exchanged where it lies otherwise."""
        value = self.values[node]
        if value.placements == placements:
            return value.node
        key = value.node, placements, note(self.at).phase
        if key not in self._moved:
            self._moved[key] = self._move(value, placements)
        if PARTIAL in value.placements and PARTIAL not in placements:
            self.values[node] = Value(self._moved[key], placements)  # a sum is taken once
        return self._moved[key]

    def settled(self, node: fx.Node) -> Placements:
        """How a value lies once its sums are taken."""
        return self.resolved(self.placements(node), self.type(node).shape)

    # -- writing -------------------------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node of the new program, in front of the old one that is being lowered."""
        return self.program.emit(target, args, kwargs, before=self.at, like=note(self.at))

    def set(self, node: fx.Node, made: fx.Node, placements: Placements) -> None:
        """Let `made` stand for the old value."""
        self.values[node] = self.value(made, placements)

    def value(self, made: fx.Node, placements: Placements) -> Value:
        """A new node that lies by `placements`."""
        annotate(made, placement=placements_text(placements, self.axes))
        return Value(made, placements)

    def all_reduce(self, local: fx.Node, axes: list[Axis], reduction: str = "sum") -> fx.Node:
        for axis in axes:
            local = self.emit(ALL_REDUCE, local, axis.name, reduction)
        return local

    def sharding_axes(self, placements: Placements, dim: int) -> list[Axis]:
        """The axes along which a dimension is sharded."""
        pairs = zip(placements, self.axes, strict=True)
        return [axis for placement, axis in pairs if isinstance(placement, Shard) and placement.dim == dim]

    def resolved(self, placements: Placements, shape: tuple[int, ...]) -> Placements:
        """What a partial tensor becomes once its sums are taken, by the axes' roles."""
        found = list(placements)
        for i, (placement, role) in enumerate(zip(placements, self.roles, strict=True)):
            if placement == PARTIAL:
                # Scattering a sum exchanges half of what an all-reduce does, and leaves less to keep: that is done
                # wherever the axis' role names a dimension, and this one divides.
                dims = {"batch": 0, "sequence": 1 if len(shape) == 3 else None, "hidden": len(shape) - 1}
                dim = dims.get(role.partial)
                found[i] = REPLICATE if dim is None or not shape else Shard(dim)
                if not divides(shape, found, self.axes):
                    found[i] = REPLICATE
        return tuple(found)

    # -- collective ------------------------------------------------------------------------------------------

    def _move(self, value: Value, target: Placements) -> fx.Node:
        """Exchange axis by axis. Shards of a dimension nest in the order of the axes, so that an axis is gathered after
        those behind it that share its dimension, and sharded before them. What only sums comes last: by then shards are
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
        """Whether an axis must let go of a dimension because one before it, which shares it, changes."""
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
        """What `action` makes of each of the sections, one behind the other."""
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
        """Placements of an operator's arguments and results: on each axis the legal row that exchanges least. `target`
        is an operator whose rule is taken in place of the node's own."""
        results = self.types[node]
        types = results if isinstance(results, tuple) else (results,)
        rows: list[Row] = []
        # One axis after the other, although the best rows of each need not be the best together: there are as many
        # combinations as rows to the power of axes, for every operator of the program.
        for i in range(len(self.axes)):
            found = tuple(self.settled(operand)[i] for operand in operands)
            call = Call(node, tuple(map(self.type, operands)), types, found)  # type: ignore[arg-type]
            rule = rule_for(target or node.target)
            legal = [row for row in [whole(call), *(rule(call) if rule else [])] if self._divides(call, row, rows)]
            # The first of those that cost the same, and `whole` stands first: taking a shard of what all ranks have is
            # free, but getting it back is not.
            best = min(legal, key=lambda row: self._cost(call, operands, row, i))
            self._check_heads(call, best, i)
            rows.append(best)
        inputs = [tuple(row.inputs[j] for row in rows) for j in range(len(operands))]
        return inputs, [tuple(row.results[j] for row in rows) for j in range(len(types))]

    def _divides(self, call: Call, row: Row, before: list[Row]) -> bool:
        """Whether all tensors of a call divide, as this row and those of the axes before have them."""
        rows = [*before, row]
        inputs = ((type, [r.inputs[j] for r in rows]) for j, type in enumerate(call.operands))
        results = ((type, [r.results[j] for r in rows]) for j, type in enumerate(call.results) if type)
        return all(divides(type.shape, placements, self.axes) for type, placements in chain(inputs, results))

    def _cost(self, call: Call, operands: list[fx.Node], row: Row, place: int) -> float:
        """Elements that a row moves along an axis; infinite where the axis' role does not allow it."""
        role, axis = self.roles[place], self.axes[place]
        # What a ring brings to each rank: of n elements that are gathered, or summed and scattered, all but its own
        # shard; an all-reduce is both, one behind the other, and counts twice in `_moves`.
        ranks = (axis.size - 1) / axis.size
        cost = 0.0
        for operand, type, wanted in zip(operands, call.operands, row.inputs, strict=True):
            found = self.placements(operand)[place]
            # Which weights are gathered is the mode's to say, however few elements that would exchange here.
            if self.is_weight(operand) and not self._may_move(role, found, wanted):
                return inf
            cost += ranks * prod(type.shape) * self._moves(found, self.settled(operand)[place], wanted)
        # Whoever makes terms of a sum pays for it, though it is taken only in front of a reader: at least as one that
        # is scattered. Operators that pass terms on, such as a view, do not pay again, nor do those that are to make
        # some.
        wanted_here = self.wanted.get(call.node)
        for result, placement in zip(call.results, row.results, strict=True):
            is_asked_for = wanted_here is not None and wanted_here[place] == PARTIAL
            if placement == PARTIAL and PARTIAL not in row.inputs and result is not None and not is_asked_for:
                cost += ranks * prod(result.shape)
        if call.node.target is aten.t.default and PARTIAL in row.inputs and call.node not in self.wanted:
            return inf  # a transposed factor has another reader than its own product: let them share the sum
        # A gradient is kept as its parameter lies. Made elsewise, it would be exchanged as soon as it is there.
        if wanted_here is not None and row.results[0] not in (PARTIAL, wanted_here[place]):
            return inf
        return cost

    def is_weight(self, node: fx.Node) -> bool:
        # Vectors, such as biases and the weights of norms, are too few to keep to a rule: they go where they are read.
        return node in self.weights and len(self.type(node).shape) > 1

    @staticmethod
    def _may_move(role: Role, found: Placement, wanted: Placement) -> bool:
        """Weights are gathered on axes whose role says so, and stay as they are on all others."""
        return wanted == REPLICATE if role.gathered else found == wanted

    @staticmethod
    def _moves(found: Placement, settled: Placement, wanted: Placement) -> float:
        """How often a tensor crosses the axis."""
        if found == wanted:
            return 0.0
        if wanted == PARTIAL:  # nothing that is whole is taken apart into terms
            return inf
        if found == REPLICATE:  # a shard of it is there already
            return 0.0
        if found == PARTIAL:  # scattered only into what `resolved` makes of it, which other readers find then
            return 2.0 if wanted == REPLICATE else 1.0 if wanted == settled else inf
        # From one dimension to another it is gathered and cut again: dearer than to read what was gathered as it is.
        return 1.0 if wanted == REPLICATE else 2.0

    def _check_heads(self, call: Call, best: Row, place: int) -> None:
        """Raises ShardingError where a sharded hidden dimension is seen as heads that do not divide by its ranks."""
        if call.node.target not in SHAPED or not isinstance(call.found[0], Shard) or best.inputs[0] != REPLICATE:
            return
        shape, seen, axis = call.operands[0].shape, self.type(call.node).shape, self.axes[place]
        if call.found[0].dim == len(shape) - 1 and len(seen) > len(shape):
            raise ShardingError(
                f"{note(call.node).module or call.node.name}: a hidden dimension of {shape[-1]}, sharded over the "
                f"{axis.size} ranks of axis {axis.name} is seen as {list(seen)}, whose heads do not divide by "
                f"{axis.size}; choose another size= for parallel['tensor'], by which all heads divide"
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
        # Arguments that name sizes of the whole name those of the shard from here on.
        if node.target in SHAPED:
            args[SHAPED[node.target]] = list(local_shape(self.type(node).shape, results[0], self.axes))
        elif node.target in SOURCE_SHAPED:
            args[1] = list(local_shape(tuple(args[1]), results[0], self.axes))
        elif node.target is aten.split.Tensor or node.target is aten.split_with_sizes.default:
            args[1] = self._local_sizes(node, results[0])
        elif node.target in SQUEEZES:
            args = [args[0], squeezed_dims(node, self.type(operands[0]).shape)]
        apart = [axis.name for axis, p in zip(self.axes, results[0], strict=True) if isinstance(p, Shard)]
        # Ranks with other shards must draw other numbers, those with the same shard the same.
        fork = self._fork(args, apart) if apart and is_random(node) else None
        made = self._emit_view(SQUEEZES.get(node.target, node.target), args, kwargs)
        if fork is not None:
            self.emit(SWAP_RNG, fork)
        made = self._share_of_mean(node, made, inputs)
        self.finish(node, made, results)

    def _fork(self, args: list[Any], axes: list[str]) -> fx.Node:
        """Let ranks draw other numbers where they have other shards along these axes, and the same where they have the
        same. The state that is to be swapped back behind what draws."""
        fork = self.emit(FORK_RNG, next(arg for arg in args if isinstance(arg, fx.Node)), axes)
        self.emit(SWAP_RNG, fork)
        return fork

    def finish(self, node: fx.Node, made: fx.Node, results: list[Placements]) -> None:
        """Let the results of `made` stand for those of the old operator."""
        if not isinstance(self.types[node], tuple):
            self.set(node, made, results[0])
            return
        types = self.types[node]
        # Only elements that somebody reads are taken out: the others would be dead code.
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
        """The operator on local shards; a view of shards that do not lie one behind the other needs a copy."""
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
        """A mean over a sharded dimension is a sum over ranks of their means, each divided by how many they are."""
        if node.target not in (aten.mean.dim, aten.mean.default):
            return made
        ndim = len(self.type(node.args[0]).shape)
        dims = {d % ndim for d in node.args[1]} if node.target is aten.mean.dim else set(range(ndim))
        ranks = prod(axis.size for dim in dims for axis in self.sharding_axes(inputs[0], dim))
        return made if ranks == 1 else self.emit(aten.div.Scalar, made, ranks)


Lowering = Callable[[Sharder, fx.Node], None]
"""Lowers one operator by hand: where local shards need another computation than the whole."""
