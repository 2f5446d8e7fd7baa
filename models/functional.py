"""Replaces `torch.nn.functional.scaled_dot_product_attention` by one operator, for code that calls it directly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..runtime.isa.attention import attention
from ..runtime.isa.threads import patched


def _key_mask(query: Tensor, key: Tensor, mask: Tensor) -> Tensor | None:
    """[B, Sk] if a bool mask is the same for all heads and queries, else None."""
    if mask.dtype != torch.bool or mask.dim() > 4:
        return None
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if shape[1] != 1 or shape[2] != 1:
        return None
    return mask.reshape(shape)[:, 0, 0].expand(query.shape[0], key.shape[2])


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Matmul, softmax, matmul over [..., S, D], half precision in fp32; queries that see no key give zeros."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lowest = torch.finfo(dtype).min
    scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(-2, -1)) * scale
    blind = None
    if mask is not None and mask.dtype == torch.bool:
        scores, blind = scores.masked_fill(~mask, lowest), ~mask.any(-1, keepdim=True)
    elif mask is not None:
        # A row of nothing but minus infinity would have a gradient of NaN.
        scores = scores + mask.to(dtype).clamp(min=lowest)
        blind = (mask == float("-inf")).all(-1, keepdim=True)
    weights = scores.softmax(-1)
    weights = weights if blind is None else weights.masked_fill(blind, 0.0)
    weights = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    return torch.matmul(weights, value.to(dtype)).to(query.dtype)


def _in_graph(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """`_plain`, with grouped key and value heads repeated; where query heads are fewer, they broadcast."""
    if query.dim() > 2 and key.shape[-3] < query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    return _plain(query, key, value, mask, scale, dropout)


def _routed(
    notes: list[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention: query [..., H, Sq, D], key and value [..., Hkv, Sk, D]."""
    if attn_mask is not None and is_causal:
        raise ValueError(
            "scaled_dot_product_attention: attn_mask and is_causal=True exclude each other; expected one of "
            "them: put the causal mask into attn_mask"
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    three = query.dim() == key.dim() == value.dim() == 3 and (attn_mask is None or attn_mask.dim() < 3)
    if three and query.shape[0] == key.shape[0] == value.shape[0]:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        return _routed(notes, query, key, value, attn_mask, dropout_p, is_causal, factor).squeeze(1)
    four = query.dim() == key.dim() == value.dim() == 4
    fits = four and query.shape[0] == key.shape[0] and key.shape[:3] == value.shape[:3]
    fits = fits and (key.shape[1] == query.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
    key_mask = _key_mask(query, key, attn_mask) if fits and attn_mask is not None else None
    if fits and (attn_mask is None or key_mask is not None):
        return attention(query, key, value, key_mask=key_mask, scale=factor, causal=is_causal, dropout=dropout_p)
    found = "" if attn_mask is None else f", mask {attn_mask.dtype} {list(attn_mask.shape)}"
    reason = f"scaled_dot_product_attention stays matmul and softmax: query {list(query.shape)}{found}"
    notes.extend([reason] if reason not in notes else [])
    if is_causal:
        square = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(square, dtype=torch.bool, device=query.device).tril()
    return _in_graph(query, key, value, attn_mask, factor, dropout_p)


@contextmanager
def functional_attention(notes: list[str]) -> Iterator[None]:
    """Within, `torch.nn.functional.scaled_dot_product_attention` is `geminifx::attention`.

    A call that it cannot express (a mask over queries or heads, an additive mask, unusual shapes) becomes matmul and
    softmax in the graph, the same on every device, and `notes` gains the reason. Code that imported the function by
    name beforehand keeps torch's.
    """
    with patched(torch.nn.functional, "scaled_dot_product_attention", partial(_routed, notes)):
        yield
