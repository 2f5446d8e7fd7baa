"""Attention by the book, in float64, and how far the operator is from it."""

from typing import Any

import torch
from geminifx.runtime.isa.attention import attention
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.1}


def reference(query, key, value, key_mask, scale, causal, window):
    """Every score, in the precision of the inputs; rows without keys give zeros and finite gradients."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows, columns = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    seen = torch.ones(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool)
    if causal:
        seen = seen & (columns <= rows)
    if window:
        seen = seen & (columns > rows - window)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    weights = torch.where(seen, query @ key.mT * scale, -1e300).softmax(-1)
    return torch.where(seen, weights, 0.0) @ value


def padding(kind, batch, length):
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "left":
        mask[0, : length // 2] = False
    elif kind == "right":
        mask[0, length - length // 2 :] = False
    else:
        mask[1] = False
    return mask


def tensors(shape_q, shape_kv, dtype=torch.float32, grad=True):
    made = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (shape_q, shape_kv, shape_kv))
    return tuple(t.requires_grad_(grad) for t in made)


def errors(mine: tuple[Tensor, ...], mask: Tensor | None, problem: dict[str, Any]) -> dict[str, float]:
    """Largest differences of the result and the three gradients, relative to the largest value there is."""
    out = attention(*mine, key_mask=mask, **problem)
    grad = torch.randn_like(out)
    exact = tuple(t.detach().double().requires_grad_() for t in mine)
    expected = reference(*exact, mask, problem["scale"], problem["causal"], problem["window"])
    found = (out, *torch.autograd.grad(out, mine, grad))
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    pairs = zip(("out", "query", "key", "value"), found, wanted, strict=True)
    return {name: ((a.double() - b).abs().max() / (1 + b.abs().max())).item() for name, a, b in pairs}
