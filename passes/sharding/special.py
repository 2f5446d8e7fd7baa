"""Operators whose computation on local shards differs from that on the whole, and for which DTensor would gather.

These are embeddings and losses over a sharded vocabulary, and layer norms over a sharded hidden dimension: each rank
computes with its shard, and small sums are exchanged. Vocabulary-parallel losses are Megatron-LM's.
"""

from math import prod
from typing import Any

import torch
from torch import fx

from ...runtime.isa.instructions import OFFSET
from ...runtime.isa.linear_cross_entropy import MEAN
from ...runtime.isa.mesh import PARTIAL, REPLICATE, Axis, Placement, Placements, Shard
from ..program.program import type_of
from ..program.types import TensorType
from .engine import Lowering, Sharder, Value, divides

aten = torch.ops.aten
EACH = 0
"""The value of a loss's `reduction` that keeps one loss per token."""


def addmm(s: Sharder, node: fx.Node) -> None:
    """Reduce the product's partial sums before adding the bias, which is placed like the product. A sum that will be
    scattered along the sequence stays partial; each rank adds bias / ranks to its part."""
    bias, x, weight = node.args[:3]
    if node.kwargs or s.type(bias).shape != s.type(node).shape[1:]:  # scaled, or not one bias per feature
        s.lower(node)
        return
    inputs, (result,) = s.choose(node, [x, weight], aten.mm.default)
    x_shard, weight_shard = s.local(x, inputs[0]), s.local(weight, inputs[1])
    late = [role.partial == "sequence" and p == PARTIAL for role, p in zip(s.roles, result, strict=True)]
    settled = tuple(p if waits else r for waits, p, r in
                    zip(late, result, s.resolved(result, s.type(node).shape), strict=True))  # fmt: skip
    along = tuple(Shard(0, p.sections) if isinstance(p, Shard) and p.dim == 1 else REPLICATE for p in settled)
    bias_shard = s.local(bias, along)
    ranks = prod(axis.size for axis, waits in zip(s.axes, late, strict=True) if waits)
    if ranks > 1:  # the sum is reduced later, along the sequence, and with it the bias
        bias_shard = s.emit(aten.div.Scalar, bias_shard, ranks)
    if settled == result:
        s.set(node, s.emit(aten.addmm.default, bias_shard, x_shard, weight_shard), result)
        return
    product = s.emit(aten.mm.default, x_shard, weight_shard)
    s.values[node] = s.value(product, result)
    s.set(node, s.emit(aten.add.Tensor, s.local(node, settled), bias_shard), settled)


def embedding(s: Sharder, node: fx.Node) -> None:
    """With a sharded vocabulary each rank looks up its own rows; a sharded hidden dimension stays sharded."""
    weight, ids = node.args[:2]
    _settle(s, weight, ids)
    weights, indices = list(s.placements(weight)), list(s.placements(ids))
    result = list[Placement]()
    ndim = len(s.type(ids).shape)
    for i, role in enumerate(s.roles):
        if role.gathered:
            weights[i] = REPLICATE
        mine = weights[i]
        if isinstance(mine, Shard):
            indices[i] = REPLICATE
            result.append(PARTIAL if mine.dim == 0 else Shard(ndim))
        else:
            result.append(indices[i])
    vocabulary = s.sharding_axes(tuple(weights), 0)
    rows, ids_shard = s.local(weight, tuple(weights)), s.local(ids, tuple(indices))
    if not vocabulary:
        s.set(node, s.emit(aten.embedding.default, rows, ids_shard, *node.args[2:]), tuple(result))
        return
    place, foreign = _own(s, ids_shard, vocabulary, s.type(weight).shape[0])
    found = s.emit(aten.embedding.default, rows, place)
    outside = s.emit(aten.unsqueeze.default, foreign, -1)
    s.set(node, s.emit(aten.masked_fill.Scalar, found, outside, 0.0), tuple(result))


def embedding_gradient(s: Sharder, node: fx.Node) -> None:
    """With a sharded vocabulary each rank sums the gradients of its own rows."""
    gradient, ids, count, padding, scales_by_frequency = node.args
    if scales_by_frequency:  # frequencies count the tokens of all ranks
        s.lower(node)
        return
    _settle(s, ids)
    last = len(s.type(gradient).shape) - 1
    wanted = _consecutive(s.wanted.get(node, s.everywhere))
    gradients, indices, result = list[Placement](), list[Placement](), list[Placement]()
    for i, role in enumerate(s.roles):
        mine = wanted[i] if not role.gathered else REPLICATE
        found = (s.settled(gradient)[i], s.placements(ids)[i])
        batch = next((p for p in found if _is_of_tokens(s, ids, [*indices, p])), REPLICATE)
        if isinstance(mine, Shard):
            gradients.append(REPLICATE if mine.dim == 0 else Shard(last))
            indices.append(REPLICATE)
            result.append(mine)
        else:
            gradients.append(batch)
            indices.append(batch)
            result.append(PARTIAL if isinstance(batch, Shard) else REPLICATE)
    vocabulary = s.sharding_axes(tuple(result), 0)
    shard, ids_shard = s.local(gradient, tuple(gradients)), s.local(ids, tuple(indices))
    if vocabulary:
        place, foreign = _own(s, ids_shard, vocabulary, count)
        if padding >= 0:
            foreign = s.emit(aten.logical_or.default, foreign, s.emit(aten.eq.Scalar, ids_shard, padding))
        shard = s.emit(aten.masked_fill.Scalar, shard, s.emit(aten.unsqueeze.default, foreign, -1), 0.0)
        count, padding, ids_shard = count // prod(axis.size for axis in vocabulary), -1, place
    s.set(node, s.emit(aten.embedding_dense_backward.default, shard, ids_shard, count, padding, False),
          tuple(result))  # fmt: skip


def _is_of_tokens(s: Sharder, ids: fx.Node, placements: list[Placement]) -> bool:
    """Whether the last of the placements, which are those on the first axes, shards tokens, and these divide evenly."""
    last, shape = placements[-1], s.type(ids).shape
    return isinstance(last, Shard) and last.dim < len(shape) and divides(shape, placements, s.axes)


def _own(s: Sharder, ids: fx.Node, axes: list[Axis], count: int) -> tuple[fx.Node, fx.Node]:
    """`ids` as indices into this rank's rows, of `count` on all ranks, and a mask of ids that belong to other ranks
    (whose index is 0)."""
    extent, place = count, ids
    for axis in axes:
        extent //= axis.size
        place = s.emit(aten.sub.Tensor, place, s.emit(OFFSET, ids, axis.name, extent))
    below, above = s.emit(aten.lt.Scalar, place, 0), s.emit(aten.ge.Scalar, place, extent)
    foreign = s.emit(aten.logical_or.default, below, above)
    return s.emit(aten.masked_fill.Scalar, place, foreign, 0), foreign


# -- norms -------------------------------------------------------------------------------------------------


def layer_norm(s: Sharder, node: fx.Node) -> None:
    """Over a sharded dimension, the sums for mean and variance take one all-reduce each."""
    x, shape, weight, bias, eps = node.args
    _settle(s, x)
    placements = s.placements(x) if len(shape) == 1 else s.everywhere
    axes = s.sharding_axes(placements, len(s.type(x).shape) - 1)
    if not axes:
        s.lower(node)
        return
    dtype, wide = s.type(x).dtype, _wide(s.type(x).dtype)
    along, statistics = _parameter(s, placements), _without_last(s, placements, len(s.type(x).shape))
    values = _cast(s, s.local(x, placements), wide)
    mean = s.all_reduce(s.emit(aten.sum.dim_IntList, values, [-1], True), axes)
    mean = s.emit(aten.div.Scalar, mean, shape[0])
    centred = s.emit(aten.sub.Tensor, values, mean)
    squares = s.emit(aten.sum.dim_IntList, s.emit(aten.mul.Tensor, centred, centred), [-1], True)
    variance = s.emit(aten.div.Scalar, s.all_reduce(squares, axes), shape[0])
    rstd = s.emit(aten.rsqrt.default, s.emit(aten.add.Scalar, variance, eps))
    result = s.emit(aten.mul.Tensor, centred, rstd)
    for operator, parameter in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if parameter is not None:
            result = s.emit(operator, result, _cast(s, s.local(parameter, along), wide))
    types = s.types[node]
    assert isinstance(types, tuple)
    kept = [_cast(s, value, t.dtype) for value, t in zip((mean, rstd), types[1:], strict=True)]  # type: ignore[union-attr]
    s.elements[node] = tuple(
        s.value(made, p) for made, p in zip((_cast(s, result, dtype), *kept), (placements, statistics, statistics),
                                            strict=True)
    )  # fmt: skip


def layer_norm_gradient(s: Sharder, node: fx.Node) -> None:
    """With n = (x - mean) * rstd and g = gradient * weight, the gradient of x is
    `rstd * (g - mean(g) - n * mean(g * n))`. Both means are over all ranks, and are all-reduced as one tensor."""
    gradient, x, shape, mean, rstd, weight, _, mask = node.args
    _settle(s, x)
    placements = s.placements(x) if len(shape) == 1 else s.everywhere
    last = len(s.type(x).shape) - 1
    axes = s.sharding_axes(placements, last)
    if not axes:
        s.lower(node)
        return
    dtype, wide = s.type(x).dtype, _wide(s.type(x).dtype)
    along, statistics = _parameter(s, placements), _without_last(s, placements, last + 1)
    given = _cast(s, s.local(gradient, placements), wide)
    centre, scale = (_cast(s, s.local(value, statistics), wide) for value in (mean, rstd))
    normal = s.emit(aten.mul.Tensor, s.emit(aten.sub.Tensor, _cast(s, s.local(x, placements), wide), centre), scale)
    inner = given if weight is None else s.emit(aten.mul.Tensor, given, _cast(s, s.local(weight, along), wide))
    along_normal = s.emit(aten.sum.dim_IntList, s.emit(aten.mul.Tensor, inner, normal), [-1], True)
    sums = s.emit(aten.cat.default, [s.emit(aten.sum.dim_IntList, inner, [-1], True), along_normal], -1)
    sums = s.emit(aten.div.Scalar, s.all_reduce(sums, axes), shape[0])
    constant, slope = (s.emit(aten.slice.Tensor, sums, -1, i, i + 1) for i in range(2))
    inner = s.emit(aten.sub.Tensor, inner, constant)
    inner = s.emit(aten.sub.Tensor, inner, s.emit(aten.mul.Tensor, normal, slope))
    d_x = _cast(s, s.emit(aten.mul.Tensor, inner, scale), dtype)
    partial = tuple(p if p == Shard(0) else PARTIAL if isinstance(o, Shard) else REPLICATE
                    for p, o in zip(along, placements, strict=True))  # fmt: skip
    dims = list(range(last))
    d_weight = s.emit(aten.sum.dim_IntList, s.emit(aten.mul.Tensor, given, normal), dims) if mask[1] else None
    d_bias = s.emit(aten.sum.dim_IntList, given, dims) if mask[2] else None
    made = [d_x, *(None if d is None else _cast(s, d, dtype) for d in (d_weight, d_bias))]
    lie = (placements, partial, partial)
    s.elements[node] = tuple(s.value(d_x if m is None else m, p) for m, p in zip(made, lie, strict=True))


def _parameter(s: Sharder, placements: Placements) -> Placements:
    """The placements of a norm's weight or bias, given those of its activation."""
    hidden = {p.dim for p in placements if isinstance(p, Shard)}
    last = max(hidden, default=0)
    return tuple(Shard(0) if isinstance(p, Shard) and p.dim == last and last else REPLICATE for p in placements)


def _without_last(s: Sharder, placements: Placements, ndim: int) -> Placements:
    return tuple(REPLICATE if isinstance(p, Shard) and p.dim == ndim - 1 else p for p in placements)


def _settle(s: Sharder, *values: fx.Node) -> None:
    """Reduce partial sums, and gather shards in sections, so that all shards are contiguous ranges."""
    for value in values:
        placements = _consecutive(s.settled(value))
        s.values[value] = Value(s.local(value, placements), placements)


def _consecutive(placements: Placements) -> Placements:
    return tuple(REPLICATE if isinstance(p, Shard) and p.sections > 1 else p for p in placements)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _cast(s: Sharder, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    found = type_of(value)
    assert isinstance(found, TensorType)
    return value if found.dtype == dtype else s.emit(aten._to_copy.default, value, dtype=dtype)


# -- losses ------------------------------------------------------------------------------------------------


def log_softmax(s: Sharder, node: fx.Node) -> None:
    """Over a sharded vocabulary, the maximum and the sum of exponentials are all-reduced, each one number per token."""
    x, dim = node.args[0], node.args[1] % len(s.type(node.args[0]).shape)
    _settle(s, x)
    axes = s.sharding_axes(s.placements(x), dim)
    if not axes:
        s.lower(node)
        return
    placements = s.placements(x)
    logits = _cast(s, s.local(x, placements), s.type(node).dtype)
    most = s.all_reduce(s.emit(aten.amax.default, logits, [dim], True), axes, "max")
    shifted = s.emit(aten.sub.Tensor, logits, most)
    total = s.emit(aten.sum.dim_IntList, s.emit(aten.exp.default, shifted), [dim], True)
    s.set(node, s.emit(aten.sub.Tensor, shifted, s.emit(aten.log.default, s.all_reduce(total, axes))), placements)


def log_softmax_gradient(s: Sharder, node: fx.Node) -> None:
    """The gradient of x is g - softmax(x) * sum(g); the sum is all-reduced, one number per token."""
    gradient, result, dim, dtype = node.args
    _settle(s, result)
    dim %= len(s.type(result).shape)
    placements = s.placements(result)
    axes = s.sharding_axes(placements, dim)
    if not axes:
        s.lower(node)
        return
    given = s.local(gradient, placements)
    total = s.all_reduce(s.emit(aten.sum.dim_IntList, given, [dim], True), axes)
    probability = s.emit(aten.exp.default, s.local(result, placements))
    s.set(
        node, _cast(s, s.emit(aten.sub.Tensor, given, s.emit(aten.mul.Tensor, probability, total)), dtype), placements
    )


def _token_placements(placements: Placements) -> Placements:
    """The placements of labels, given those of log-probabilities [tokens, vocabulary]."""
    return tuple(Shard(0) if p == Shard(0) else REPLICATE for p in placements)


def nll_loss(s: Sharder, node: fx.Node) -> None:
    """Losses and token counts are summed over the ranks, so that the mean is over all tokens. Without a reduction, each
    token's loss is on the ranks that have the token."""
    logs, labels, weight, reduction, ignored = node.args
    _settle(s, logs)
    placements = s.placements(logs)
    if weight is not None or not any(isinstance(p, Shard) for p in placements) or len(s.type(logs).shape) != 2:
        s.lower(node)
        return
    vocabulary, tokens = s.sharding_axes(placements, 1), s.sharding_axes(placements, 0)
    shard, labels_shard = s.local(logs, placements), s.local(labels, _token_placements(placements))
    counted = s.emit(aten.ne.Scalar, labels_shard, ignored)
    place, foreign = _own(s, labels_shard, vocabulary, s.type(logs).shape[1])
    left_out = s.emit(aten.logical_or.default, foreign, s.emit(aten.logical_not.default, counted))
    picked = s.emit(aten.gather.default, shard, 1, s.emit(aten.unsqueeze.default, place, 1))
    picked = s.emit(aten.masked_fill.Scalar, s.emit(aten.squeeze.dim, picked, 1), left_out, 0.0)
    if reduction == EACH:
        loss, lie = s.all_reduce(s.emit(aten.neg.default, picked), vocabulary), _token_placements(placements)
    else:
        loss = s.all_reduce(s.emit(aten.neg.default, s.emit(aten.sum.default, picked)), [*tokens, *vocabulary])
        lie = s.everywhere
    count = s.emit(aten.sum.default, _cast(s, counted, s.type(logs).dtype))
    count = s.all_reduce(count, tokens)
    if reduction == MEAN:
        loss = s.emit(aten.div.Tensor, loss, count)
    s.elements[node] = (s.value(loss, lie), s.value(count, s.everywhere))


def nll_loss_gradient(s: Sharder, node: fx.Node) -> None:
    """A token's gradient is at its label, on the rank with that part of the vocabulary; all else is zero."""
    gradient, logs, labels, weight, reduction, ignored, count = node.args
    _settle(s, logs)
    placements = s.placements(logs)
    vocabulary = s.sharding_axes(placements, 1)
    if weight is not None or not vocabulary:
        s.lower(node)
        return
    shard, labels_shard = s.local(logs, placements), s.local(labels, _token_placements(placements))
    place, foreign = _own(s, labels_shard, vocabulary, s.type(logs).shape[1])
    left_out = s.emit(aten.logical_or.default, foreign, s.emit(aten.eq.Scalar, labels_shard, ignored))
    given = _token_placements(placements) if reduction == EACH else s.everywhere
    each = s.emit(aten.neg.default, s.local(gradient, given))
    if reduction == MEAN:
        each = s.emit(aten.div.Tensor, each, s.local(count, s.everywhere))
    tokens = type_of(labels_shard).shape  # type: ignore[union-attr]
    each = s.emit(aten.masked_fill.Scalar, s.emit(aten.expand.default, each, list(tokens)), left_out, 0.0)
    place, each = (s.emit(aten.unsqueeze.default, value, 1) for value in (place, each))
    s.set(node, s.emit(aten.scatter.src, s.emit(aten.zeros_like.default, shard), 1, place, each), placements)


SPECIAL: dict[Any, Lowering] = {
    aten.addmm.default: addmm,
    aten.embedding.default: embedding, aten.embedding_dense_backward.default: embedding_gradient,
    aten.native_layer_norm.default: layer_norm, aten.native_layer_norm_backward.default: layer_norm_gradient,
    aten._log_softmax.default: log_softmax, aten._log_softmax_backward_data.default: log_softmax_gradient,
    aten.nll_loss_forward.default: nll_loss, aten.nll_loss_backward.default: nll_loss_gradient,
}  # fmt: skip
