"""`geminifx::attention`: the one attention operator of the program, the same node on every device.

torch lowers scaled-dot-product attention differently for each device that it is traced on, and an explicit mask rules
out the flash kernel and takes an S x S tensor. One operator with its own fake kernel, backward and FLOP formula keeps
the captured program device independent; the kernel is chosen when it runs (`runtime/kernels/attention.py`).

Definition, for query row i and key column j of one head:

    weights = softmax over visible j of (query_i . key_j * scale);  out_i = sum_j dropout(weights)_ij value_j
    j is visible when key_mask[b, j], and if causal j <= i, and if window > 0 also j > i - window

A row that sees no key gives zeros (and zero gradients), not NaN; its logsumexp is +inf.

Dropout draws from torch's default generator of the device. On CPU it makes the same single draw that
`torch.nn.functional.scaled_dot_product_attention` makes, so a seeded run drops the same weights as a model
that calls that function; on CUDA the numbers are those of the kernel that runs. `rng` is the generator state
from which the backward draws again: uint8 [RNG_BYTES], or [0] if dropout is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .precision import accumulate_dtype

OPERATORS = ("attention", "attention_backward")
"""The operators defined in this module."""

# A CPU generator's state. One size on every device, so that a plan made on CPU fakes also holds on a GPU.
RNG_BYTES = torch.Generator().get_state().numel()

# The tag marks seeded randomness, so that recomputation also restores the generator.
torch.library.define(
    "geminifx::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? key_mask, float scale, bool causal, float dropout, "
    "int window) -> (Tensor out, Tensor logsumexp, Tensor rng)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
torch.library.define(
    "geminifx::attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor out, Tensor logsumexp, "
    "Tensor rng, float scale, bool causal, float dropout, int window) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True)
class Problem:
    """The non-tensor arguments of one attention; `scale` multiplies scores, `window` 0 means none."""

    scale: float
    causal: bool
    dropout: float
    window: int


def check_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, problem: Problem) -> None:
    """Raises ValueError if the arguments do not describe an attention; also runs on fake tensors, at capture."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(f"attention: expected [batch, heads, length, size] tensors, got {shapes}; reshape them")
    if query.shape[-1] != key.shape[-1] or key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise ValueError(f"attention: batch, key length, key heads and query/key head size must agree, got {shapes}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"attention: query heads must be a multiple of key heads, got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"attention: dtypes differ ({query.dtype}, {key.dtype}, {value.dtype}); cast to one")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (key.shape[0], key.shape[2])):
        found = f"{key_mask.dtype} {tuple(key_mask.shape)}"
        raise ValueError(f"attention: key_mask must be bool [batch, key length], got {found} with {shapes}")
    if problem.window < 0 or (problem.window and not problem.causal):
        raise ValueError(f"attention: window={problem.window} needs causal=True and a positive size; 0 means none")
    if not 0.0 <= problem.dropout <= 1.0:
        raise ValueError(f"attention: dropout must lie in [0, 1], got {problem.dropout}")


def _empty(like: Tensor, heads: int, length: int, size: int) -> Tensor:
    """A tensor [B, H, S, D] in the memory order of [B, S, H, D], in which kernels write their results."""
    return like.new_empty((like.shape[0], length, heads, size)).transpose(1, 2)


@torch.library.register_fake("geminifx::attention")
def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention(query, key, value, key_mask, Problem(scale, causal, dropout, window))
    batch, heads, length, _ = query.shape
    logsumexp = query.new_empty((batch, heads, length), dtype=accumulate_dtype(query.dtype))
    rng = query.new_empty((RNG_BYTES if dropout else 0,), dtype=torch.uint8)
    return _empty(query, heads, length, value.shape[-1]), logsumexp, rng


@torch.library.register_fake("geminifx::attention_backward")
def _attention_backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [_empty(t, t.shape[1], t.shape[2], t.shape[3]) for t in (query, key, value)]
    return grads[0], grads[1], grads[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    grads = torch.ops.geminifx.attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None)


torch.library.register_autograd("geminifx::attention", _differentiate, setup_context=_save)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float,
    causal: bool,
    dropout: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Attention of query [B, H, Sq, D] over key [B, Hkv, Sk, D] and value [B, Hkv, Sk, Dv].

    H is a multiple of Hkv. `key_mask` bool [B, Sk], True = attend. `window` counts keys, the query's own
    included, and needs `causal`. Returns [B, H, Sq, Dv] whose transpose(1, 2) is contiguous. Under autocast
    the tensors are cast first, as torch does for its own attention.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out: Tensor = torch.ops.geminifx.attention(query, key, value, key_mask, scale, causal, dropout, window)[0]
    return out


def attention_flops(
    query: Sequence[int],
    value: Sequence[int],
    *,
    causal: bool,
    window: int = 0,
    backward: bool = False,
) -> int:
    """FLOPs of one call, from the shapes of query [B, H, Sq, D] and value [B, Hkv, Sk, Dv].

    Counts a multiply and an add for each visible query-key pair, including keys that a key mask hides, since their
    number is data. Forward: scores and output. Backward: the scores again, then the gradients of weights, values,
    queries and keys.
    """
    batch, heads, queries, size = query
    keys, value_size = value[2], value[3]
    pairs = queries * keys
    if causal:
        # Row i sees the columns before i + 1, except those before i + 1 - window.
        pairs = _ramp(queries, keys) - (_ramp(max(queries - window, 0), keys) if window else 0)
    products = 3 * size + 2 * value_size if backward else size + value_size
    return 2 * batch * heads * pairs * products


def _ramp(rows: int, top: int) -> int:
    """1 + 2 + 3 + ... over `rows` terms, none above `top`."""
    rise = min(rows, top)
    return rise * (rise + 1) // 2 + top * (rows - rise)


@register_flop_formula(torch.ops.geminifx.attention)
def _forward_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **_: Any) -> int:
    return attention_flops(query, value, causal=args[2], window=args[4])


@register_flop_formula(torch.ops.geminifx.attention_backward)
def _backward_flops(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **_: Any
) -> int:
    return attention_flops(query, value, causal=args[5], window=args[7], backward=True)
