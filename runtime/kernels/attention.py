"""The kernels behind `geminifx::attention`: dispatch, and what all routes have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..isa.attention import RNG_BYTES, Problem, check_attention
from ..isa.layout import contiguous_stride
from ..isa.precision import accumulate_dtype
from .attention_backends import BACKWARD, FORWARD, Saved, route, seeing_rows


def _dense(tensor: Tensor) -> Tensor:
    """Makes a tensor contiguous with canonical strides, also in dimensions of size 1, as the fake kernel has them."""
    tensor, stride = tensor.contiguous(), contiguous_stride(tensor.shape)
    return tensor if tensor.stride() == stride else tensor.as_strided(tensor.shape, stride, tensor.storage_offset())


def _lay_out(tensor: Tensor) -> Tensor:
    """Gives [B, H, S, D] the memory order of [B, S, H, D], which the projections around attention read."""
    return _dense(tensor.transpose(1, 2)).transpose(1, 2)


def _prepare(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, problem: Problem) -> tuple[Any, ...]:
    """Drops the keys that a causal mask hides from every query, and repeats grouped key and value heads.

    Returns query, key, value and the key mask, with a contiguous last dimension as kernels need it. The mask is not
    None if any row may see no key.
    """
    visible = min(query.shape[2], key.shape[2]) if problem.causal else key.shape[2]
    groups = query.shape[1] // key.shape[1]
    if visible < key.shape[2]:
        key, value = key[:, :, :visible], value[:, :, :visible]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if key_mask is None and problem.window and query.shape[2] > visible:
        key_mask = torch.ones((key.shape[0], visible), dtype=torch.bool, device=key.device)
    return query, key, value, None if key_mask is None else key_mask[:, :visible]


@torch.library.impl("geminifx::attention", ("cpu", "cuda"))
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(scale, causal, dropout, window)
    check_attention(query, key, value, key_mask, problem)
    query, key, value, key_mask = _prepare(query, key, value, key_mask, problem)
    name = route(query, key, value, key_mask, problem)
    out, logsumexp, drawn = FORWARD[name](query, key, value, key_mask, problem)
    if key_mask is not None:
        # Kernels leave zeros, NaN or a mean in rows without keys; make the result the same for all.
        rows = seeing_rows(key_mask, query.shape[2], problem)[:, None]
        out = out.masked_fill(~rows[..., None], 0.0)
        logsumexp = logsumexp.masked_fill(~rows, float("inf"))
    rng = query.new_zeros(RNG_BYTES if dropout else 0, dtype=torch.uint8)
    if dropout and drawn is not None:
        drawn = drawn.to(query.device).view(torch.uint8)
        rng[: drawn.numel()] = drawn
    return _lay_out(out), _dense(logsumexp.to(accumulate_dtype(query.dtype))), rng


@torch.library.impl("geminifx::attention_backward", ("cpu", "cuda"))
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    rng: Tensor,
    scale: float,
    causal: bool,
    dropout: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(scale, causal, dropout, window)
    kv_heads, keys = key.shape[1], key.shape[2]
    query, key, value, key_mask = _prepare(query, key, value, key_mask, problem)
    name = route(query, key, value, key_mask, problem)
    if key_mask is not None:
        rows = seeing_rows(key_mask, query.shape[2], problem)[:, None, :, None]
        grad = grad.masked_fill(~rows, 0.0)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    saved = Saved(out, logsumexp, rng)
    grad_query, *pair = BACKWARD[name](grad, (query, key, value), key_mask, saved, problem)
    if kv_heads != query.shape[1]:
        pair = [t.unflatten(1, (kv_heads, -1)).sum(2) for t in pair]
    if keys != key.shape[2]:
        pair = [torch.nn.functional.pad(t, (0, 0, 0, keys - key.shape[2])) for t in pair]
    return _lay_out(grad_query), _lay_out(pair[0]), _lay_out(pair[1])
