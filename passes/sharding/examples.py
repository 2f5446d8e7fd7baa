"""How operators treat examples: rules for splitting a batch into parts that are computed one after the other.

They extend the rules of `rules.py`, which apply here too. Operators that take sizes as arguments may be split here,
because the program of a part has sizes of its own. A loss over all examples is the sum or the mean of the parts'
losses.
"""

from typing import Any

import torch

from ...runtime.isa.linear_cross_entropy import MEAN as BY_MEAN
from ...runtime.isa.mesh import PARTIAL, REPLICATE, Partial, Placement, Shard
from ..program.program import tensor_type
from .rules import Call, Row, Rule, along_others, elementwise, mapped, rule_for

aten = torch.ops.aten


class Mean(Partial):
    """A term of a mean: the tensor is the mean over the parts."""

    def __str__(self) -> str:
        return "mean"


class Rows(Shard):
    """The indices 0, 1, ... of the examples along a dimension; each part counts its own from 0."""

    def __str__(self) -> str:
        return f"rows of {super().__str__()}"


MEAN = Mean()

FILLS = frozenset({
    aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.scalar_tensor.default,
    aten.new_full.default, aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default,
})  # fmt: skip
"""Operators that read no values and whose results hold one value everywhere."""

DRAWS = frozenset({
    aten.native_dropout.default, aten.bernoulli.p, aten.bernoulli.default, aten.rand.default, aten.randn.default,
    aten.rand_like.default, aten.randn_like.default, aten.randint.default, aten.randint.low, aten.randint_like.default,
    aten.randint_like.low_dtype, aten.uniform.default, aten.normal_functional.default, aten.rrelu_with_noise.default,
    torch.ops.geminifx.bernoulli_like.default, torch.ops.geminifx.attention.default,
})  # fmt: skip
"""Random operators that draw equally many numbers whatever the values of their arguments."""


def _every(call: Call) -> list[Row]:
    """Operators that treat each example of the first argument separately; the other arguments are the same for all."""
    results = tuple(Shard(0) if result and result.shape[:1] == call.operands[0].shape[:1] else REPLICATE
                    for result in call.results)  # fmt: skip
    return [Row((Shard(0), *(REPLICATE,) * (len(call.operands) - 1)), results)]


def _reduced(call: Call) -> list[Row]:
    """Reductions over some dimensions: split along the others."""
    given, ndim = call.arg(1, "dim"), len(call.operands[0].shape)
    dims = [given] if isinstance(given, int) else given or range(ndim)
    gone = {dim % ndim for dim in dims}
    keeps = bool(call.arg(2, "keepdim", False))
    along = lambda dim: None if dim in gone else dim if keeps else dim - sum(g < dim for g in gone)  # noqa: E731
    return [row for row in mapped(call, along) if PARTIAL not in row.inputs]


def _triangular(call: Call) -> list[Row]:
    last = len(call.operands[0].shape) - 2
    return [row for row in mapped(call, lambda dim: dim if dim < last else None) if PARTIAL not in row.inputs]


def _embedding(call: Call) -> list[Row]:
    return [Row((REPLICATE, shard), (shard,)) for _, shard in call.found_shards()]


def _biased_product(call: Call) -> list[Row]:
    bias = Shard(0) if len(call.operands[0].shape) == 2 and call.operands[0].shape[0] > 1 else REPLICATE
    return [Row((bias, Shard(0), REPLICATE), (Shard(0),))]


def _added_batched_product(call: Call) -> list[Row]:
    added = call.operands[0].shape
    own = Shard(0) if len(added) == 3 and added[0] > 1 else REPLICATE
    return [Row((own, Shard(0), Shard(0)), (Shard(0),))]


def _placed_one(call: Call) -> list[Row]:
    """Replacement of a slice at one index of a dimension: split along the others."""
    picked = call.arg(2, "dim") % len(call.operands[0].shape)
    shards = [shard for i, shard in call.found_shards() if i == 0 and shard.dim != picked]
    return [Row((s, Shard(s.dim - (s.dim > picked))), (s,)) for s in shards]


def _picked(call: Call) -> list[Row]:
    """Selection of slices by indices that are the same for all examples."""
    dim = call.arg(1, "dim") % len(call.operands[0].shape)
    return [Row((shard, REPLICATE), (shard,)) for i, shard in call.found_shards() if i == 0 and shard.dim != dim]


def _taken_apart(call: Call) -> list[Row]:
    gone = call.arg(1, "dim", 0) % len(call.operands[0].shape)
    return mapped(call, lambda dim: None if dim == gone else dim - (dim > gone))


def _stacked(call: Call) -> list[Row]:
    new = call.arg(1, "dim", 0) % (len(call.operands[0].shape) + 1)
    shards = dict.fromkeys(shard for _, shard in call.found_shards())
    return [Row((shard,) * len(call.operands), (Shard(shard.dim + (shard.dim >= new)),)) for shard in shards]


def _repeated(call: Call) -> list[Row]:
    times, ndim = call.arg(1, "repeats"), len(call.operands[0].shape)
    added = len(times) - ndim
    return mapped(call, lambda dim: dim + added if times[dim + added] == 1 else None)


def _indexed(call: Call) -> list[Row]:
    """`x[i, j]`, in three cases: no index runs along the examples; or the first one holds their indices; or x is one
    table for all of them."""
    indices = call.node.args[1]
    first = next(i for i, index in enumerate(indices) if index is not None)
    given = [index for index in indices[first:] if index is not None]
    if any(index is None for index in indices[first : first + len(given)]):  # not adjacent: torch puts them first
        return []
    ndim = max(len(tensor_type(index).shape) for index in given)
    source, *found = call.found
    if source == Shard(0) and first > 0 and all(place == REPLICATE for place in found):
        return [Row(call.found, (Shard(0),))]
    along = {_index_dim(place, tensor_type(index).shape, ndim) for place, index in zip(found, given, strict=True)}
    along -= {None}
    rows = [place for place in found if isinstance(place, Rows)]
    numbered = source == Shard(0) and first == 0 and isinstance(found[0], Rows) and len(rows) == 1
    if len(along) != 1 or not (numbered or (source == REPLICATE and not rows)):
        return []
    (dim,) = along
    assert dim is not None
    if any(_is_along(place, tensor_type(index).shape, dim, ndim) for place, index in zip(found, given, strict=True)):
        return []
    return [Row(call.found, (Shard(first + dim),))]


def _index_dim(place: Placement, shape: tuple[int, ...], ndim: int) -> int | None:
    """The dimension of the broadcast indices along which one index is split; None if it is not."""
    return place.dim + ndim - len(shape) if isinstance(place, Shard) else None


def _is_along(place: Placement, shape: tuple[int, ...], dim: int, ndim: int) -> bool:
    """Whether an index that is the same for all parts has an element for each example."""
    own = dim - ndim + len(shape)
    return place == REPLICATE and own >= 0 and shape[own] != 1


# -- losses ------------------------------------------------------------------------------------------------


def _loss(reduction: int) -> Rule:
    """The rule of an elementwise loss whose `reduction` is the argument at this position."""

    def rule(call: Call) -> list[Row]:
        how = call.arg(reduction, "reduction", BY_MEAN)
        result = {0: None, BY_MEAN: MEAN}.get(how, PARTIAL)
        return [Row(row.inputs, row.results if result is None else (result,)) for row in elementwise(call)]

    return rule


def _token_losses(call: Call) -> list[Row]:
    """Arguments: log-probabilities, labels, perhaps class weights. `average_loss` weights means by their token
    counts."""
    reduction = call.arg(3, "reduction")
    rest = (REPLICATE,) * (len(call.operands) - 2)
    results: tuple[Placement, ...] = (MEAN, PARTIAL) if reduction == BY_MEAN else (PARTIAL, PARTIAL)
    return [Row((Shard(0), Shard(0), *rest), results if reduction else (Shard(0), REPLICATE))]


_LAST = along_others(1, "dim", -1)

EXAMPLES: dict[Any, Rule] = {
    aten.embedding.default: _embedding,
    aten.addmm.default: _biased_product, aten.baddbmm.default: _added_batched_product,
    aten.native_group_norm.default: _every, aten._native_batch_norm_legit_no_training.default: _every,
    aten.max_pool2d_with_indices.default: _every, aten.avg_pool2d.default: _every,
    aten._adaptive_avg_pool2d.default: _every, aten.avg_pool1d.default: _every,
    aten.upsample_nearest2d.vec: _every, aten.upsample_bilinear2d.vec: _every,
    aten.argmax.default: _reduced, aten.argmin.default: _reduced, aten.amin.default: _reduced,
    aten.any.dim: _reduced, aten.any.dims: _reduced, aten.all.dim: _reduced, aten.all.dims: _reduced,
    aten.max.dim: _reduced, aten.min.dim: _reduced, aten.logsumexp.default: _reduced, aten.prod.dim_int: _reduced,
    aten.var.correction: _reduced, aten.std.correction: _reduced,
    aten.tril.default: _triangular, aten.triu.default: _triangular,
    aten.sort.default: _LAST, aten.topk.default: along_others(2, "dim", -1), aten.flip.default: along_others(1, "dims"),
    aten.roll.default: along_others(2, "dims", ()), aten.gather.default: along_others(1, "dim"),
    aten.scatter.src: along_others(1, "dim"), aten.scatter.value: along_others(1, "dim"),
    aten.scatter_add.default: along_others(1, "dim"), aten.slice_scatter.default: along_others(2, "dim", 0),
    aten.select_scatter.default: _placed_one, aten.index_select.default: _picked, aten.unbind.int: _taken_apart,
    aten.repeat.default: _repeated, aten.stack.default: _stacked,
    aten.index.Tensor: _indexed, aten._unsafe_index.Tensor: _indexed,
    aten.mse_loss.default: _loss(2), aten.smooth_l1_loss.default: _loss(2), aten.huber_loss.default: _loss(2),
    aten.soft_margin_loss.default: _loss(2), aten.binary_cross_entropy.default: _loss(3),
    aten.binary_cross_entropy_with_logits.default: _loss(4),
    aten.nll_loss_forward.default: _token_losses, aten.nll_loss2d_forward.default: _token_losses,
}  # fmt: skip

EXAMPLES |= dict.fromkeys(
    (aten.copy.default, aten.fill.Scalar, aten.fill.Tensor, aten.bernoulli.default, aten.randn_like.default,
     aten.randint_like.default, aten.randint_like.low_dtype, aten.uniform.default, aten.normal_functional.default,
     aten.rrelu_with_noise.default, torch.ops.geminifx.bernoulli_like.default), elementwise
)  # fmt: skip

SHIFTS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar})

MEANS = frozenset({aten.mean.dim, aten.mean.default})
"""Reductions that `rules.py` treats as sums, and that are divided by the number of their terms."""


def legal(call: Call) -> list[Row]:
    """The legal rows of a call when the batch is split."""
    rule = EXAMPLES.get(call.node.target) or rule_for(call.node.target)
    rows = rule(call) if rule else []
    if call.node.target in MEANS:
        rows = [Row(row.inputs, (MEAN,)) if _reduces(row) else row for row in rows]
    if call.node.target in SHIFTS and call.found == (MEAN,):  # shifted by a number, for which `linear` has no row
        rows = [Row((PARTIAL,), (MEAN,))]
    return rows


def _reduces(row: Row) -> bool:
    return PARTIAL in row.results and PARTIAL not in row.inputs
