"""How operators may be sharded: for each, a function from a call to its legal rows on one axis of the mesh.

A row gives a placement for every tensor argument and every result, such as `S0, R -> S0` for a matrix product. A mode
with several axes takes one row for each. The sharder chooses among them; an operator without a rule here is computed on
whole tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ...runtime.isa.mesh import PARTIAL, REPLICATE, Placement, Shard
from ..program.types import NumberType, TensorType, Type

aten = torch.ops.aten


@dataclass(frozen=True)
class Row:
    """The placements of the tensor arguments and of the results on one axis."""

    inputs: tuple[Placement, ...]
    results: tuple[Placement, ...]


@dataclass(frozen=True)
class Call:
    """One operator call, on one axis.

    Fields:
        node: the call itself.
        operands: the unsharded types of its tensor arguments.
        results: the unsharded types of its results, None for an absent one.
        found: the placements of its tensor arguments on the axis, once partial sums are reduced.
    """

    node: fx.Node
    operands: tuple[TensorType, ...]
    results: tuple[TensorType | None, ...]
    found: tuple[Placement, ...]

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)

    def found_shards(self) -> list[tuple[int, Shard]]:
        """The arguments that are sharded, as pairs of position and shard."""
        return [(i, p) for i, p in enumerate(self.found) if isinstance(p, Shard)]


Rule = Callable[[Call], list[Row]]


def operand_type(found: Type) -> Type:
    """For the rules, a number among the arguments is a scalar tensor that is the same on all ranks."""
    return TensorType(torch.float64, (), ()) if isinstance(found, NumberType) else found


def whole(call: Call) -> Row:
    """Everything replicated, which is legal for every operator."""
    return Row((REPLICATE,) * len(call.operands), (REPLICATE,) * len(call.results))


def _alike(call: Call, inputs: tuple[Placement, ...], result: Placement) -> Row:
    return Row(inputs, (result,) * len(call.results))


# -- elementwise -------------------------------------------------------------------------------------------


def elementwise(call: Call) -> list[Row]:
    """All sharded along one dimension of the result; arguments that are broadcast along it are replicated."""
    ndim = max((len(operand.shape) for operand in call.operands), default=0)
    candidates: dict[tuple[int, int], None] = {}
    for i, shard in call.found_shards():
        dim = shard.dim + ndim - len(call.operands[i].shape)
        candidates[dim, shard.sections] = None
    rows = []
    for dim, sections in candidates:
        inputs = tuple(_aligned(operand, dim, ndim, sections) for operand in call.operands)
        rows.append(_alike(call, inputs, Shard(dim, sections)))
    return rows


def _aligned(operand: TensorType, dim: int, ndim: int, sections: int) -> Placement:
    own = dim - ndim + len(operand.shape)
    return REPLICATE if own < 0 or operand.shape[own] == 1 else Shard(own, sections)


def linear(call: Call) -> list[Row]:
    """Elementwise, and linear in all tensor arguments together: partial sums may be reduced later."""
    adds_number = call.node.target in (aten.add.Tensor, aten.sub.Tensor) and len(_tensors(call)) < 2
    return [*elementwise(call), *([] if adds_number else [_alike(call, (PARTIAL,) * len(call.operands), PARTIAL)])]


def scaling(call: Call) -> list[Row]:
    """Elementwise, and linear in the first argument."""
    rows = elementwise(call)
    if call.operands and _tensors(call) == list(call.node.all_input_nodes) and call.node.args[0] in _tensors(call):
        rows.append(_alike(call, (PARTIAL, *(REPLICATE,) * (len(call.operands) - 1)), PARTIAL))
    return rows


def product(call: Call) -> list[Row]:
    """Elementwise, and linear in each of two arguments separately."""
    rows = scaling(call)
    return [*rows, _alike(call, (REPLICATE, PARTIAL), PARTIAL)] if len(call.node.all_input_nodes) == 2 else rows


def cast(call: Call) -> list[Row]:
    """Elementwise; partial sums may be reduced after a cast between floating-point types, but not after one from or to
    integers."""
    is_float = all(type.dtype.is_floating_point for type in (*call.operands, *call.results) if type)
    return scaling(call) if is_float else elementwise(call)


def _tensors(call: Call) -> list[fx.Node]:
    """The positional tensor arguments with repetitions: a square has the same one twice, and is not linear in it."""
    return [value for value in call.node.args if isinstance(value, fx.Node)]


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of a call in order, with repetitions: a square has the same one twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


# -- shapes ------------------------------------------------------------------------------------------------


def mapped(call: Call, along: Callable[[int], int | None]) -> list[Row]:
    """Dimension `d` of the only argument becomes `along(d)` of every result; `along` returns None if it cannot be
    sharded."""
    rows = [Row((PARTIAL,), (PARTIAL,) * len(call.results))]
    for _, shard in call.found_shards():
        dim = along(shard.dim)
        if dim is not None:
            rows.append(Row((shard,), (Shard(dim, shard.sections),) * len(call.results)))
    return rows


def reshaped(call: Call) -> list[Row]:
    """Shards follow `view_dim`; those in sections only if their dimension keeps its size."""
    source, target = call.operands[0].shape, call.results[0].shape  # type: ignore[union-attr]
    rows = mapped(call, lambda dim: view_dim(source, target, dim))
    sectioned = [row for row in rows if isinstance(row.inputs[0], Shard) and row.inputs[0].sections > 1]
    keeps = lambda row: source[row.inputs[0].dim] == target[row.results[0].dim]  # noqa: E731
    return [row for row in rows if row not in sectioned or keeps(row)]


def view_dim(source: tuple[int, ...], target: tuple[int, ...], dim: int) -> int | None:
    """The dimension of `target` whose equal parts are those of dimension `dim` of `source`, or None.

    A view merges or splits neighbouring dimensions; only the first of these keeps its parts.
    """
    before = prod(source[:dim])
    if source[dim] == 1:
        return None
    taken = 1
    for place, size in enumerate(target):
        if taken == before and size != 1:
            return place
        taken *= size
    return None


def transposed(call: Call) -> list[Row]:
    """Shards move with their dimension."""
    ndim = len(call.operands[0].shape)
    if call.node.target is aten.t.default:
        return mapped(call, lambda dim: ndim - 1 - dim)
    if call.node.target is aten.permute.default:
        order = [d % ndim for d in call.arg(1, "dims")]
        return mapped(call, order.index)
    a, b = call.arg(1, "dim0") % ndim, call.arg(2, "dim1") % ndim
    return mapped(call, lambda dim: {a: b, b: a}.get(dim, dim))


def expanded(call: Call) -> list[Row]:
    """Dimensions that keep their size may be sharded; repeated ones are replicated."""
    source, target = call.operands[0].shape, call.results[0].shape  # type: ignore[union-attr]
    added = len(target) - len(source)
    return mapped(call, lambda dim: dim + added if source[dim] == target[dim + added] else None)


def unsqueezed(call: Call) -> list[Row]:
    new = call.arg(1, "dim") % (len(call.operands[0].shape) + 1)
    return mapped(call, lambda dim: dim + (dim >= new))


def squeezed(call: Call) -> list[Row]:
    gone = squeezed_dims(call.node, call.operands[0].shape)
    return mapped(call, lambda dim: None if dim in gone else dim - sum(g < dim for g in gone))


def squeezed_dims(node: fx.Node, shape: tuple[int, ...]) -> list[int]:
    """The dimensions that a squeeze removes."""
    given = node.args[1] if len(node.args) > 1 else range(len(shape))
    dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given)}
    return sorted(d for d in dims if shape[d] == 1)


def selected(call: Call) -> list[Row]:
    picked = call.arg(1, "dim") % len(call.operands[0].shape)
    return mapped(call, lambda dim: None if dim == picked else dim - (dim > picked))


def along_others(place: int, name: str, default: Any = None) -> Rule:
    """The operator works along the dimensions that argument `place` names; all others may be sharded."""

    def rule(call: Call) -> list[Row]:
        given = call.arg(place, name, default)
        ndim = len(call.operands[0].shape)
        dims = {d % ndim for d in ([given] if isinstance(given, int) else given)} if ndim else set()
        shards = dict.fromkeys(shard for _, shard in call.found_shards() if shard.dim not in dims)
        return [_alike(call, (shard,) * len(call.operands), shard) for shard in shards]

    return rule


def sliced(call: Call) -> list[Row]:
    """Slices and their backwards: sharded along other dimensions, or along this one if the slice takes all of it."""
    place = 1 if call.node.target is aten.slice.Tensor else 2
    ndim = len(call.operands[0].shape)
    dim = call.arg(place, "dim", 0) % ndim
    everything = call.results[0].shape == call.operands[0].shape  # type: ignore[union-attr]
    return mapped(call, lambda d: d if d != dim or everything else None)


def select_gradient(call: Call) -> list[Row]:
    picked = call.arg(2, "dim") % len(call.arg(1, "input_sizes"))
    return mapped(call, lambda dim: dim + (dim >= picked))


def padded(call: Call) -> list[Row]:
    ndim = len(call.operands[0].shape)
    pad = call.arg(1, "pad")
    touched = {ndim - 1 - i // 2 for i, amount in enumerate(pad) if amount}
    return [row for row in mapped(call, lambda dim: None if dim in touched else dim) if row.inputs != (PARTIAL,)]


def split(call: Call) -> list[Row]:
    """Sharded along other dimensions, or along this one in as many sections as the split has equal results."""
    dim = call.arg(2, "dim", 0) % len(call.operands[0].shape)
    rows = mapped(call, lambda d: d if d != dim else None)
    sizes = {result.shape for result in call.results if result is not None}
    if len(sizes) == 1:
        rows.append(Row((Shard(dim, len(call.results)),), (Shard(dim),) * len(call.results)))
    return rows


def joined(call: Call) -> list[Row]:
    """Sharded along other dimensions; or equal parts become sections, as in the backward of `split`."""
    dim = call.arg(1, "dim", 0) % len(call.operands[0].shape)
    rows = [_alike(call, (PARTIAL,) * len(call.operands), PARTIAL)]
    shards = dict.fromkeys(shard for _, shard in call.found_shards() if shard.dim != dim)
    rows += [_alike(call, (shard,) * len(call.operands), shard) for shard in shards]
    if len({operand.shape for operand in call.operands}) == 1:
        rows.append(_alike(call, (Shard(dim),) * len(call.operands), Shard(dim, len(call.operands))))
    return rows


# -- sums and products -------------------------------------------------------------------------------------


def summed(call: Call) -> list[Row]:
    """Sums and means: along a sharded dimension each rank has a partial sum."""
    ndim = len(call.operands[0].shape)
    dims, keeps = call.arg(1, "dim", None), bool(call.arg(2, "keepdim", False))
    gone = {d % ndim for d in dims} if dims else set(range(ndim))
    rows = [Row((PARTIAL,), (PARTIAL,))]
    for _, shard in call.found_shards():
        if shard.dim in gone:
            rows.append(Row((shard,), (PARTIAL,)))
        else:
            dim = shard.dim - (0 if keeps else sum(g < shard.dim for g in gone))
            rows.append(Row((shard,), (Shard(dim, shard.sections),)))
    return rows


def largest(call: Call) -> list[Row]:
    """As for sums, but along a sharded dimension no rank can tell the maximum alone."""
    return [row for row in summed(call) if PARTIAL not in row.results]


def matrix_product(call: Call) -> list[Row]:
    """[m, k] x [k, n]: rows of the first, columns of the second, or k of both, which yields partial sums."""
    sections = {s.sections for _, s in call.found_shards()} | {1}
    rows = [
        Row((Shard(0), REPLICATE), (Shard(0),)),
        *(Row((REPLICATE, Shard(1, n)), (Shard(1, n),)) for n in sections),
        *(Row((Shard(0, n), REPLICATE), (Shard(0, n),)) for n in sections if n > 1),
        *(Row((Shard(1, n), Shard(0, n)), (PARTIAL,)) for n in sections),
    ]
    return rows


def batched_product(call: Call) -> list[Row]:
    """[b, m, k] x [b, k, n]: along b, or within each batch as in `matrix_product`."""
    return [
        Row((Shard(0), Shard(0)), (Shard(0),)),
        Row((Shard(1), REPLICATE), (Shard(1),)),
        Row((REPLICATE, Shard(2)), (Shard(2),)),
        Row((Shard(2), Shard(1)), (PARTIAL,)),
    ]


# -- layers ------------------------------------------------------------------------------------------------


def attention(call: Call) -> list[Row]:
    """Sharded along the batch or the heads. A mask is sharded with the batch; each rank keeps its own generator's
    state."""
    batch, heads = Shard(0), Shard(1)
    mask = len(call.operands) - 3
    return [
        Row((batch,) * len(call.operands), (batch, batch, REPLICATE)),
        Row((heads,) * 3 + (REPLICATE,) * mask, (heads, heads, REPLICATE)),
    ]


def attention_gradient(call: Call) -> list[Row]:
    """Arguments: gradient, query, key, value, perhaps a mask, result, logsumexp, generator state."""
    batch, heads, masked = Shard(0), Shard(1), len(call.operands) == 8
    return [
        Row((batch,) * (len(call.operands) - 1) + (REPLICATE,), (batch,) * 3),
        Row((heads,) * 4 + (REPLICATE,) * masked + (heads, heads, REPLICATE), (heads,) * 3),
    ]


def convolution(call: Call) -> list[Row]:
    return [Row((Shard(0), *(REPLICATE,) * (len(call.operands) - 1)), (Shard(0),))]


def convolution_gradient(call: Call) -> list[Row]:
    return [Row((Shard(0), Shard(0), REPLICATE), (Shard(0), PARTIAL, PARTIAL))]


def normalized(call: Call) -> list[Row]:
    """Layer norm, sharded along dimensions that it does not normalise."""
    kept = len(call.operands[0].shape) - len(call.arg(1, "normalized_shape"))
    shards = dict.fromkeys(shard for _, shard in call.found_shards()[:1] if shard.dim < kept)
    return [Row((s, *(REPLICATE,) * (len(call.operands) - 1)), (s, s, s)) for s in shards]


def normalized_gradient(call: Call) -> list[Row]:
    """Arguments: gradient, input, mean, reciprocal deviation, then weight and bias."""
    kept = len(call.operands[0].shape) - len(call.arg(2, "normalized_shape"))
    shards = dict.fromkeys(shard for _, shard in call.found_shards() if shard.dim < kept)
    rest = (REPLICATE,) * (len(call.operands) - 4)
    return [Row((s, s, s, s, *rest), (s, PARTIAL, PARTIAL)) for s in shards]


def token_losses(call: Call) -> list[Row]:
    """The backward of a loss over tokens. Arguments: gradient (a scalar, or one per token), log-probabilities, labels,
    perhaps class weights, token count."""
    middle = (REPLICATE,) * (len(call.operands) - 4)
    given = Shard(0) if call.operands[0].shape else REPLICATE
    return [Row((given, Shard(0), Shard(0), *middle, REPLICATE), (Shard(0),))]


RULES: dict[Any, Rule] = {
    aten.add.Tensor: linear, aten.sub.Tensor: linear, aten.neg.default: linear, aten.clone.default: linear,
    aten.mul.Tensor: product, aten.div.Tensor: scaling, aten.mul.Scalar: scaling, aten.div.Scalar: scaling,
    aten._to_copy.default: cast,
    aten.view.default: reshaped, aten._unsafe_view.default: reshaped, aten.reshape.default: reshaped,
    aten.t.default: transposed, aten.transpose.int: transposed, aten.permute.default: transposed,
    aten.expand.default: expanded, aten.unsqueeze.default: unsqueezed,
    aten.squeeze.dim: squeezed, aten.squeeze.dims: squeezed, aten.squeeze.default: squeezed,
    aten.select.int: selected, aten.select_backward.default: select_gradient,
    aten.slice.Tensor: sliced, aten.slice_backward.default: sliced, aten.constant_pad_nd.default: padded,
    aten.split.Tensor: split, aten.split_with_sizes.default: split, aten.cat.default: joined,
    aten.sum.dim_IntList: summed, aten.sum.default: summed, aten.mean.dim: summed, aten.mean.default: summed,
    aten.amax.default: largest,
    aten.mm.default: matrix_product, aten.bmm.default: batched_product,
    aten._softmax.default: along_others(1, "dim"), aten._softmax_backward_data.default: along_others(2, "dim"),
    aten._log_softmax.default: along_others(1, "dim"),
    aten._log_softmax_backward_data.default: along_others(2, "dim"),
    aten.cumsum.default: along_others(1, "dim"),
    aten.native_layer_norm.default: normalized, aten.native_layer_norm_backward.default: normalized_gradient,
    aten.nll_loss_backward.default: token_losses,
    aten.convolution.default: convolution, aten.convolution_backward.default: convolution_gradient,
    torch.ops.geminifx.attention.default: attention,
    torch.ops.geminifx.attention_backward.default: attention_gradient,
}  # fmt: skip

RULES |= dict.fromkeys(
    (aten.native_dropout.default, aten.bernoulli.p, aten.zeros_like.default, aten.ones_like.default,
     aten.full_like.default, aten.rand_like.default, aten.masked_fill.Tensor), elementwise
)  # fmt: skip


def rule_for(target: Any) -> Rule | None:
    """The rule of an operator, or None."""
    return RULES.get(target, elementwise if torch.Tag.pointwise in getattr(target, "tags", ()) else None)
