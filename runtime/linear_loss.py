"""`geminifx::linear_cross_entropy`: projection onto the vocabulary and cross-entropy, in pieces.

The logits of a language model, [tokens, vocabulary], are often its largest tensor by far, and the loss makes
several float32 copies of them. Here no more than a piece of them exists at any time. Definition, per token:

    logits = scale * (hidden @ weight.T + bias);  where softcap is not 0: logits = softcap * tanh(logits)
    loss   = mean (reduction 1) or sum (reduction 2) of -log_softmax(logits)[label] where label != ignore_index

The forward takes `token_chunk` tokens at a time over the whole vocabulary, so that each row goes through the
very operators that the plain loss is made of, and the sum over tokens is torch's own: in float32 the loss has
the same bits wherever the matrix product does not depend on the number of rows. It leaves two numbers per
token, the `normalizer`: the largest logit, and the logarithm of the sum of exponentials relative to it.

With those the backward can take all tokens over `vocabulary_chunk` columns at a time. A row of the weight's
gradient is then one product over all tokens, rounded once, and needs no float32 buffer of the weight's size;
only the gradient of `hidden`, which is smaller, is accumulated, in float32. As in torch's own loss, a mean
over no token at all is NaN and its gradients are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .attention_kernels import accumulate_dtype

MEAN, SUM = 1, 2
"""Reductions, as torch numbers them."""

PIECE_BYTES = 128 * 2**20
"""One piece of the logits in float32. On an H200, 8,192 tokens of 2,048 features and 50,272 classes cost 7% more
time in pieces of this size than in ones four times as large, and another 9% in ones half as large."""

SMALLEST_PIECE, PIECES = 256, 8
"""Products of fewer rows wait for the weight to be read. Small problems are cut too, into at most `PIECES`."""

_IGNORED = -100

torch.library.define(
    "geminifx::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float softcap, int ignore_index, "
    "int reduction, int token_chunk) -> (Tensor loss, Tensor total_weight, Tensor normalizer)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "geminifx::linear_cross_entropy_backward",
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor total_weight, "
    "Tensor normalizer, float scale, float softcap, int ignore_index, int reduction, int vocabulary_chunk, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What a pass puts in the place of an output that is not computed, so that the others keep their positions.
torch.library.define("geminifx::absent", "(Tensor loss) -> Tensor")


def token_chunk(tokens: int, vocabulary: int) -> int:
    """Tokens per piece of the forward: a multiple of 128 within PIECE_BYTES, SMALLEST_PIECE at least."""
    return _piece(tokens, vocabulary)


def vocabulary_chunk(tokens: int, vocabulary: int) -> int:
    """Columns per piece of the backward: a multiple of 128 within PIECE_BYTES, SMALLEST_PIECE at least."""
    return _piece(vocabulary, tokens)


def _piece(length: int, width: int) -> int:
    size = min(PIECE_BYTES // (4 * max(width, 1)), -(-length // PIECES))
    return max(size // 128 * 128, SMALLEST_PIECE)


class _Projection(NamedTuple):
    """How logits come of hidden states."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float

    def tokens(self, start: int, stop: int) -> _Projection:
        return self._replace(hidden=self.hidden[start:stop])

    def columns(self, start: int, stop: int) -> _Projection:
        bias = None if self.bias is None else self.bias[start:stop]
        return self._replace(weight=self.weight[start:stop], bias=bias)

    @property
    def is_plain(self) -> bool:
        return self.scale == 1.0 and not self.softcap

    def product(self) -> Tensor:
        """hidden @ weight.T + bias, in the inputs' dtype."""
        if self.bias is None:
            return torch.mm(self.hidden, self.weight.t())
        return torch.addmm(self.bias, self.hidden, self.weight.t())

    def scaled(self, product: Tensor) -> Tensor:
        """The logits before the softcap, in the accumulation dtype; in float32 in the memory of `product`."""
        product = product.to(accumulate_dtype(product.dtype))
        return product if self.scale == 1.0 else product.mul_(self.scale)

    def log_probabilities(self) -> tuple[Tensor, Tensor, Tensor]:
        """log_softmax of the logits, the largest logit of each row, and its column."""
        logits = self.scaled(self.product())
        logits = logits.tanh_().mul_(self.softcap) if self.softcap else logits
        largest, where = logits.max(-1, keepdim=True)
        return torch.log_softmax(logits, -1), largest, where


def _check(projection: _Projection, labels: Tensor, reduction: int, chunk: int) -> None:
    """Raise ValueError where the arguments do not describe a loss; runs on fakes too."""
    hidden, weight, bias = projection[:3]
    found = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"linear_cross_entropy: expected [tokens, size] and [vocabulary, size], got {found}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: expected an int64 label per token, got {labels.dtype}, {found}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_cross_entropy: bias {tuple(bias.shape)} does not fit {found}")
    if reduction not in (MEAN, SUM) or chunk < 1:
        raise ValueError(
            f"linear_cross_entropy: expected reduction {MEAN} (mean) or {SUM} (sum) and a positive chunk, got "
            f"reduction={reduction}, chunk={chunk}"
        )


@torch.library.impl("geminifx::linear_cross_entropy", ("cpu", "cuda"))
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    reduction: int,
    token_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    projection = _Projection(hidden, weight, bias, scale, softcap)
    _check(projection, labels, reduction, token_chunk)
    wide, tokens = accumulate_dtype(hidden.dtype), hidden.shape[0]
    picked = hidden.new_empty(tokens, dtype=wide)
    normalizer = hidden.new_empty((2, tokens), dtype=wide)
    for start in range(0, tokens, token_chunk):
        rows = slice(start, start + token_chunk)
        logs, largest, where = projection.tokens(rows.start, rows.stop).log_probabilities()
        normalizer[0, rows] = largest[:, 0]
        # At the largest logit nothing but the logarithm of the sum is left.
        normalizer[1, rows] = -logs.gather(1, where)[:, 0]
        nll = torch.ops.aten.nll_loss_forward(logs, labels[rows], None, 0, ignore_index)[0]
        picked[rows] = nll.neg_()
        del logs  # before the next piece is made
    one_class = torch.where(labels == ignore_index, _IGNORED, 0)
    loss, total_weight = torch.ops.aten.nll_loss_forward(picked[:, None], one_class, None, reduction, _IGNORED)
    return loss, total_weight, normalizer


@torch.library.register_fake("geminifx::linear_cross_entropy")
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    reduction: int,
    token_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(_Projection(hidden, weight, bias, scale, softcap), labels, reduction, token_chunk)
    wide = accumulate_dtype(hidden.dtype)
    loss, total_weight = (hidden.new_empty((), dtype=wide) for _ in range(2))
    return loss, total_weight, hidden.new_empty((2, hidden.shape[0]), dtype=wide)


@torch.library.impl("geminifx::linear_cross_entropy_backward", ("cpu", "cuda"))
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    total_weight: Tensor,
    normalizer: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    reduction: int,
    vocabulary_chunk: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    projection = _Projection(hidden, weight, bias, scale, softcap)
    _check(projection, labels, reduction, vocabulary_chunk)
    wide = accumulate_dtype(hidden.dtype)
    share = grad.to(wide) / total_weight if reduction == MEAN else grad.to(wide)
    factors = torch.where(labels == ignore_index, 0.0, share * scale)[:, None]
    d_hidden, d_weight, d_bias = _results(projection, output_mask, wide)
    for start in range(0, weight.shape[0], vocabulary_chunk):
        columns = slice(start, start + vocabulary_chunk)
        piece = projection.columns(columns.start, columns.stop)
        d_logits = _d_product(piece, normalizer, labels[:, None] - start, factors)
        if output_mask[2]:
            torch.sum(d_logits, 0, out=d_bias[columns])
        if output_mask[1]:
            torch.mm(d_logits.t(), hidden, out=d_weight[columns])
        if output_mask[0]:
            _add_product(d_hidden, d_logits, piece.weight)
        del d_logits  # before the next piece is made
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _results(projection: _Projection, mask: Sequence[bool], wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients; what is not wanted is empty."""
    hidden, weight = projection.hidden, projection.weight
    return (
        hidden.new_zeros(hidden.shape if mask[0] else (0,), dtype=wide),
        weight.new_empty(weight.shape if mask[1] else (0,)),
        weight.new_empty(weight.shape[:1] if mask[2] else (0,)),
    )


def _d_product(piece: _Projection, normalizer: Tensor, labels: Tensor, factors: Tensor) -> Tensor:
    """The gradient of the matrix product in some columns; few passes, and in place, for it is large.

    `labels` [tokens, 1] count from the piece's first column; `factors` [tokens, 1] are all that rows are
    multiplied by.
    """
    product = piece.product()
    largest, log_sum = normalizer[:, :, None]
    slope = None
    if piece.is_plain and product.dtype != normalizer.dtype:
        d_logits = product - (largest + log_sum)  # wide, in one pass
    else:
        d_logits = piece.scaled(product)
        if piece.softcap:
            slope = d_logits.tanh_()
            d_logits = slope * piece.softcap
        d_logits.sub_(largest).sub_(log_sum)
    d_logits.exp_()
    inside = (labels >= 0) & (labels < piece.weight.shape[0])
    column = torch.where(inside, labels, 0)
    # Scattering what was gathered, not adding in place: that one is not deterministic on every device.
    d_logits.scatter_(1, column, d_logits.gather(1, column) - inside.to(d_logits.dtype))
    if slope is not None:
        d_logits.mul_(slope.square_().neg_().add_(1.0).mul_(piece.softcap))
    return torch.mul(d_logits, factors, out=product)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total` += a @ b, where `total` may have a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # a CPU's product rounds its result; summing rounded pieces would lose half a digit
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@torch.library.register_fake("geminifx::linear_cross_entropy_backward")
def _backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    total_weight: Tensor,
    normalizer: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    reduction: int,
    vocabulary_chunk: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    projection = _Projection(hidden, weight, bias, scale, softcap)
    _check(projection, labels, reduction, vocabulary_chunk)
    return _results(projection, output_mask, hidden.dtype)


def _absent(loss: Tensor) -> Tensor:
    return loss.new_empty(0)


torch.library.impl("geminifx::absent", ("cpu", "cuda"), _absent)
torch.library.register_fake("geminifx::absent", _absent)


# -- autograd, costs ---------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = inputs[4:8]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    hidden, weight = ctx.saved_tensors[:2]
    chunk = vocabulary_chunk(hidden.shape[0], weight.shape[0])
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    grads = torch.ops.geminifx.linear_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options, chunk, wanted)
    return (*(g if needed else None for g, needed in zip(grads, wanted, strict=True)), *(None,) * 6)


torch.library.register_autograd("geminifx::linear_cross_entropy", _differentiate, setup_context=_save)


@register_flop_formula(torch.ops.geminifx.linear_cross_entropy)
def _forward_flops(hidden: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.geminifx.linear_cross_entropy_backward)
def _backward_flops(grad: object, hidden: Sequence[int], weight: Sequence[int], *args: Any, **_: Any) -> int:
    products = 1 + sum(args[-1][:2])  # the logits again, then what is wanted of the two gradients
    return products * 2 * hidden[0] * weight[0] * weight[1]


def forward_workspace_bytes(tokens: int, vocabulary: int, chunk: int, dtype: torch.dtype) -> int:
    """Device memory inside the forward besides its results: two wide pieces, and a few numbers per token."""
    wide = accumulate_dtype(dtype).itemsize
    return min(chunk, tokens) * vocabulary * 2 * wide + tokens * 32


def backward_workspace_bytes(hidden: Sequence[int], chunk: int, dtype: torch.dtype, softcap: float) -> int:
    """Device memory inside the backward besides its results; `chunk` are the columns of a piece."""
    tokens, size = hidden
    wide = accumulate_dtype(dtype).itemsize
    narrow = dtype.itemsize if dtype.itemsize < wide else 0
    piece = tokens * chunk * (wide * (2 if softcap else 1) + narrow)
    return piece + ((tokens + chunk) * size * wide if narrow else 0) + tokens * 64


FORWARD = torch.ops.geminifx.linear_cross_entropy.default
BACKWARD = torch.ops.geminifx.linear_cross_entropy_backward.default
ABSENT = torch.ops.geminifx.absent.default
