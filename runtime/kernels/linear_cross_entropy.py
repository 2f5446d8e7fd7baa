"""The kernels behind `geminifx::linear_cross_entropy`.

The forward takes `token_chunk` tokens at a time over the whole vocabulary, so that each row goes through the very
operators of the unfused loss, and torch itself sums over tokens: in float32 the loss has the same bits wherever the
matrix product does not depend on the number of rows. It saves two numbers per token, the `normalizer`: the largest
logit, and the logarithm of the sum of exponentials relative to it.

From these the backward can take all tokens over `vocabulary_chunk` columns at a time. Each row of the weight's gradient
is then one product over all tokens, rounded once, and needs no float32 buffer of the weight's size; only the gradient
of `hidden`, which is smaller, is accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..isa.linear_cross_entropy import MEAN, check_loss, new_gradients
from ..isa.precision import accumulate_dtype

_IGNORED = -100


class _Projection(NamedTuple):
    """How logits are computed from hidden states; see `product`, `scaled` and `log_probabilities`."""

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
        """The logits before the softcap, in the accumulation dtype; if that is the product's, in its memory."""
        product = product.to(accumulate_dtype(product.dtype))
        return product if self.scale == 1.0 else product.mul_(self.scale)

    def log_probabilities(self) -> tuple[Tensor, Tensor, Tensor]:
        """The log_softmax of the logits, the largest logit of each row, and its column."""
        logits = self.scaled(self.product())
        logits = logits.tanh_().mul_(self.softcap) if self.softcap else logits
        largest, where = logits.max(-1, keepdim=True)
        return torch.log_softmax(logits, -1), largest, where


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
    check_loss(hidden, weight, bias, labels, reduction=reduction, chunk=token_chunk)
    wide, tokens = accumulate_dtype(hidden.dtype), hidden.shape[0]
    picked = hidden.new_empty(tokens, dtype=wide)
    normalizer = hidden.new_empty((2, tokens), dtype=wide)
    for start in range(0, tokens, token_chunk):
        rows = slice(start, start + token_chunk)
        logs, largest, where = projection.tokens(rows.start, rows.stop).log_probabilities()
        normalizer[0, rows] = largest[:, 0]
        # At the largest logit, log_softmax is minus the logarithm of the sum.
        normalizer[1, rows] = -logs.gather(1, where)[:, 0]
        nll = torch.ops.aten.nll_loss_forward(logs, labels[rows], None, 0, ignore_index)[0]
        picked[rows] = nll.neg_()
        del logs  # before the next piece is made
    one_class = torch.where(labels == ignore_index, _IGNORED, 0)
    loss, total_weight = torch.ops.aten.nll_loss_forward(picked[:, None], one_class, None, reduction, _IGNORED)
    return loss, total_weight, normalizer


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
    check_loss(hidden, weight, bias, labels, reduction=reduction, chunk=vocabulary_chunk)
    wide = accumulate_dtype(hidden.dtype)
    share = grad.to(wide) / total_weight if reduction == MEAN else grad.to(wide)
    factors = torch.where(labels == ignore_index, 0.0, share * scale)[:, None]
    d_hidden, d_weight, d_bias = new_gradients(hidden, weight, output_mask, wide)
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


def _d_product(piece: _Projection, normalizer: Tensor, labels: Tensor, factors: Tensor) -> Tensor:
    """The gradient of the matrix product in the piece's columns, in few passes and in place because it is large.

    `labels` [tokens, 1] count from the piece's first column; `factors` [tokens, 1] multiply the rows.
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
    # Gather and scatter instead of adding in place, which is not deterministic on every device.
    d_logits.scatter_(1, column, d_logits.gather(1, column) - inside.to(d_logits.dtype))
    if slope is not None:
        d_logits.mul_(slope.square_().neg_().add_(1.0).mul_(piece.softcap))
    return torch.mul(d_logits, factors, out=product)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes `total` += a @ b, where `total` may have a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the CPU's product rounds its result; summing rounded pieces would lose half a digit
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
