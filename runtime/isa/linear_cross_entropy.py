"""`geminifx::linear_cross_entropy`: projection onto the vocabulary and cross-entropy, in pieces.

The logits of a language model, [tokens, vocabulary], are often its largest tensor by far, and the loss makes
several float32 copies of them. Here only a piece of them exists at any time. Definition, per token:

    logits = scale * (hidden @ weight.T + bias);  if softcap is not 0: logits = softcap * tanh(logits)
    loss   = mean (reduction 1) or sum (reduction 2) of -log_softmax(logits)[label] where label != ignore_index

As in torch's own loss, a mean over no tokens is NaN and its gradients are zero. The kernels, in
`runtime/kernels/linear_cross_entropy.py`, describe the pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .precision import accumulate_dtype

OPERATORS = ("linear_cross_entropy", "linear_cross_entropy_backward", "absent")
"""The operators defined in this module."""

MEAN, SUM = 1, 2
"""Reductions, as torch numbers them."""

PIECE_BYTES = 128 * 2**20
"""Bytes of one piece of the logits in float32. On an H200, 8,192 tokens of 2,048 features and 50,272 classes take 7%
more time in pieces of this size than in pieces four times as large, and another 9% in pieces half as large."""

SMALLEST_PIECE, PIECES = 256, 8
"""Matrix products of fewer rows are bound by reading the weight. Small problems are split too, into at most
`PIECES`."""

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
# Replaces an output that is not computed, so that the others keep their positions.
torch.library.define("geminifx::absent", "(Tensor loss) -> Tensor")


def token_chunk(tokens: int, vocabulary: int) -> int:
    """Tokens per piece of the forward: a multiple of 128 within PIECE_BYTES, at least SMALLEST_PIECE."""
    return _piece(tokens, vocabulary)


def vocabulary_chunk(tokens: int, vocabulary: int) -> int:
    """Columns per piece of the backward: a multiple of 128 within PIECE_BYTES, at least SMALLEST_PIECE."""
    return _piece(vocabulary, tokens)


def _piece(length: int, width: int) -> int:
    size = min(PIECE_BYTES // (4 * max(width, 1)), -(-length // PIECES))
    return max(size // 128 * 128, SMALLEST_PIECE)


def check_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, reduction: int, chunk: int
) -> None:
    """Raises ValueError if the arguments do not describe a loss; also runs on fake tensors."""
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


def new_gradients(
    hidden: Tensor, weight: Tensor, mask: Sequence[bool], wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates the gradients of hidden, weight and bias; those that `mask` does not ask for are empty."""
    return (
        hidden.new_zeros(hidden.shape if mask[0] else (0,), dtype=wide),
        weight.new_empty(weight.shape if mask[1] else (0,)),
        weight.new_empty(weight.shape[:1] if mask[2] else (0,)),
    )


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
    check_loss(hidden, weight, bias, labels, reduction=reduction, chunk=token_chunk)
    wide = accumulate_dtype(hidden.dtype)
    loss, total_weight = (hidden.new_empty((), dtype=wide) for _ in range(2))
    return loss, total_weight, hidden.new_empty((2, hidden.shape[0]), dtype=wide)


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
    check_loss(hidden, weight, bias, labels, reduction=reduction, chunk=vocabulary_chunk)
    return new_gradients(hidden, weight, output_mask, hidden.dtype)


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
    products = 1 + sum(args[-1][:2])  # the logits again, then the requested ones of the two gradients
    return products * 2 * hidden[0] * weight[0] * weight[1]


def forward_workspace_bytes(tokens: int, vocabulary: int, chunk: int, dtype: torch.dtype) -> int:
    """Device bytes that the forward takes besides its results: two wide pieces and a few numbers per token."""
    wide = accumulate_dtype(dtype).itemsize
    return min(chunk, tokens) * vocabulary * 2 * wide + tokens * 32


def backward_workspace_bytes(hidden: Sequence[int], chunk: int, dtype: torch.dtype, softcap: float) -> int:
    """Device bytes that the backward takes besides its results; `chunk` is the number of columns per piece."""
    tokens, size = hidden
    wide = accumulate_dtype(dtype).itemsize
    narrow = dtype.itemsize if dtype.itemsize < wide else 0
    piece = tokens * chunk * (wide * (2 if softcap else 1) + narrow)
    return piece + ((tokens + chunk) * size * wide if narrow else 0) + tokens * 64


FORWARD = torch.ops.geminifx.linear_cross_entropy.default
BACKWARD = torch.ops.geminifx.linear_cross_entropy_backward.default
ABSENT = torch.ops.geminifx.absent.default
