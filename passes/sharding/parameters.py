"""How a mode shards the parameters, derived from how the program uses them and not from their names.

Values are followed from the inputs on. The first linear layer after a residual stream turns its activations (it shards
out if the stream was whole, or the reverse), the second turns them back. A parameter that meets an activation in an
elementwise operator or a norm, such as a bias, is sharded like the activation's hidden dimension.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import fx

from ...runtime.isa.errors import ShardingError
from ...runtime.isa.instructions import MICROBATCH
from ...runtime.isa.mesh import PARTIAL, REPLICATE, Axis, Placement, Placements, Shard, parse_placements
from ..program.plan import Plan
from ..program.program import Program, note, type_of
from ..program.types import TensorType
from .modes import Role, roles_of

aten = torch.ops.aten
_VIEWS = frozenset({
    aten.t.default, aten.view.default, aten.transpose.int, aten.permute.default, aten._to_copy.default,
    aten.expand.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.clone.default,
})  # fmt: skip
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


@dataclass
class Use:
    """How the program uses a parameter.

    Fields:
        turned: whether the activations that it meets come from the first linear layer of a pair (see above).
        out: the output dimension of a linear weight or the vocabulary of an embedding; None for other parameters.
        into: the input dimension of a linear weight, or an embedding's hidden dimension.
        hidden: for other parameters, the dimension that runs along an activation's hidden dimension, if any.
        sections: how many equal parts a fused projection's output is split into.
    """

    turned: bool
    out: int | None = None
    into: int | None = None
    hidden: int | None = None
    sections: int = 1


@dataclass
class Found:
    """The placements of all parameters by name, and notes for the user about those that stay whole."""

    placements: dict[str, Placements] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def whole_parameters(program: Program, plan: Plan) -> tuple[str, ...]:
    """Notes for the user about parameters that a mode would shard but that stay whole."""
    return tuple(place_parameters(program, plan).notes)


def place_parameters(program: Program, plan: Plan) -> Found:
    """The placements of the parameters by name. The first matching pattern in the plan's table overrides the mode.

    Raises ShardingError for a pattern that matches no parameter, and for a table entry that is malformed, is partial,
    shards over a replica axis, or does not divide its parameter evenly.
    """
    axes, roles, table = plan.mesh.tensor_axes, roles_of(plan), dict(plan.request.table)
    uses, found = _uses(program), Found()
    for name, node in program.inputs("parameter").items():
        shape = _shape(node)
        pattern = next((p for p in table if re.fullmatch(p, name)), None)
        if pattern is not None:
            found.placements[name] = _parsed(table[pattern], axes)
            _check_replicated(name, found.placements[name], axes)
            _check_divides(name, shape, found.placements[name], axes)
            continue
        use, taken = uses.get(node), [1] * len(shape)
        placements: list[Placement] = []
        for axis in axes:
            dim = None if use is None else _sharded_dim(use, roles[axis.name])
            sections = 1 if use is None or dim is None or dim not in (use.out, use.hidden) else use.sections
            if dim is not None and shape[dim] % (sections * taken[dim] * axis.size):
                found.notes.append(f"{name} {list(shape)} stays replicated on {axis.name}: {shape[dim]} is not "
                                   f"divisible by {sections * taken[dim] * axis.size}")  # fmt: skip
                dim = None
            placements.append(REPLICATE if dim is None else Shard(dim, sections))
            if dim is not None:
                taken[dim] *= axis.size
        found.placements[name] = tuple(placements)
    unused = next((p for p in table if not any(re.fullmatch(p, name) for name in found.placements)), None)
    if unused is not None:
        such = next(iter(found.placements))
        raise ShardingError(f"parallel: the table's pattern {unused!r} matches no parameter, such as {such}")
    return found


def _parsed(text: str, axes: tuple[Axis, ...]) -> Placements:
    try:
        return parse_placements(text, axes)
    except ValueError as error:
        names = ", ".join(axis.name for axis in axes)
        raise ShardingError(
            f"parallel: the table has the placement {text!r}, which cannot be parsed ({error}); expected R, or an "
            f"axis ({names}) and a dimension, such as {axes[0].name}=S0"
        ) from error


def _sharded_dim(use: Use, role: Role) -> int | None:
    """The dimension of a parameter that an axis shards."""
    hidden = is_hidden_sharded(role, use.turned)
    if use.out is not None:
        return {"out": use.out, "in": use.into, "turns": use.into if hidden else use.out, None: None}[role.weight]
    return use.hidden if hidden else None


def is_hidden_sharded(role: Role, turned: bool) -> bool:
    """Whether the axis shards the hidden dimension of activations: if `turned`, of those made by a first linear layer,
    else of all others."""
    return role.activation == "hidden" if role.weight != "turns" else (role.activation == "hidden") != turned


def _check_replicated(name: str, placements: Placements, axes: tuple[Axis, ...]) -> None:
    for placement, axis in zip(placements, axes, strict=True):
        if axis.kind == "replica" and placement != REPLICATE:
            raise ShardingError(
                f"parallel: the table has {placement} for {name} on {axis.name}, an axis along which all processes "
                "hold the same weights; leave that axis out (zero=3 divides weights over it)"
            )


def _check_divides(name: str, shape: tuple[int, ...], placements: Placements, axes: tuple[Axis, ...]) -> None:
    if PARTIAL in placements:
        raise ShardingError(
            f"parallel: the table has P for {name}, but a parameter is not a partial sum; expected R, or S and a "
            "dimension"
        )
    taken = [1] * len(shape)
    for placement, axis in zip(placements, axes, strict=True):
        if not isinstance(placement, Shard):
            continue
        dim, sections = placement.dim, placement.sections
        if dim >= len(shape):
            raise ShardingError(
                f"parallel: the table has {placement} for {name} {list(shape)}, which has no dimension {dim}"
            )
        taken[dim] *= axis.size
        if sections < 1 or shape[dim] % (sections * taken[dim]):
            within = "" if sections == 1 else f" in {sections} sections"
            raise ShardingError(
                f"parallel: the table shards dimension {dim} of {name} {list(shape)} over {taken[dim]} ranks{within}, "
                "and its size is not divisible by that; choose another dimension, or another size= for "
                "parallel['tensor']"
            )


def _uses(program: Program) -> dict[fx.Node, Use]:
    """How each parameter is used first."""
    found: dict[fx.Node, Use] = {}
    turned: dict[fx.Node, bool] = {}
    origins = _origins(program)
    for node in program.computes:
        if note(node).phase != "forward" or node in origins:
            continue
        given = any(turned.get(value, False) for value in node.all_input_nodes if value not in origins)
        turned[node] = given
        for parameter in dict.fromkeys(origins[value] for value in node.all_input_nodes if value in origins):
            use = _use(node, parameter, origins, given)
            if use is not None:
                found.setdefault(parameter, use)
                turned[node] = turned[node] if use.out is None or node.target is aten.embedding.default else not given
    return found


def _origins(program: Program) -> dict[fx.Node, fx.Node]:
    """Maps values that are a parameter seen through views and casts to that parameter."""
    origins = {node: node for node in program.inputs("parameter").values()}
    for node in program.computes:
        if node.target in _VIEWS and node.args[0] in origins:
            origins[node] = origins[node.args[0]]
    return origins


def _use(node: fx.Node, parameter: fx.Node, origins: dict[fx.Node, fx.Node], turned: bool) -> Use | None:
    """How one operator uses a parameter; `turned` says whether its other arguments are turned activations."""
    ndim = len(_shape(parameter))
    if node.target in (aten.mm.default, aten.addmm.default):
        weight = node.args[-1]
        if origins.get(weight) is parameter and ndim == 2:
            stored_out_first = weight.target is aten.t.default
            out, into = (0, 1) if stored_out_first else (1, 0)
            return Use(turned, out, into, sections=_sections(node))
        return Use(not turned, hidden=ndim - 1, sections=_sections(node))  # a bias is placed like the result
    if node.target is aten.embedding.default:
        return Use(False, out=0, into=1) if _from_input(node.args[1]) else Use(False, hidden=1)
    if node.target is aten.convolution.default:
        return None
    return Use(turned, hidden=ndim - 1) if ndim else None


def _from_input(indices: fx.Node) -> bool:
    """Whether indices come from the caller, like tokens; positions are computed."""
    while indices.op == "call_function" and indices.target in (*_VIEWS, aten.slice.Tensor, MICROBATCH):
        indices = indices.args[0]
    return indices.op == "placeholder"


def _sections(projection: fx.Node) -> int:
    """How many equal parts the result of a projection is split into, such as 3 for fused query, key and value."""
    readers = [projection]
    while len(readers) == 1 and readers[0].target not in _SPLITS:
        readers = [user for user in readers[0].users if user.target in (*_SPLITS, *_VIEWS, aten.add.Tensor)]
    parts = type_of(readers[0]) if readers else None
    if not isinstance(parts, tuple):
        return 1
    shapes = {part.shape for part in parts if isinstance(part, TensorType)}
    last = len(next(iter(shapes))) - 1
    dim = readers[0].args[2] if len(readers[0].args) > 2 else 0
    return len(parts) if len(shapes) == 1 and dim % (last + 1) == last else 1


def _shape(node: fx.Node) -> tuple[int, ...]:
    found = type_of(node)
    assert isinstance(found, TensorType)
    return found.shape
