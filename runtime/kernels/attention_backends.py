"""The arithmetic behind `geminifx::attention`: which kernel runs a problem, and how each one is called.

Shapes: query [B, H, Sq, D], key [B, H, Sk, D], value [B, H, Sk, Dv] (heads already expanded by the caller),
key_mask bool [B, Sk] or None. Every forward returns (out, logsumexp, random state or None).

| route     | device | runs                                                      | memory      |
|-----------|--------|-----------------------------------------------------------|-------------|
| cpu       | CPU    | torch's CPU flash kernel: no dropout, no window           | O(S)        |
| cudnn     | CUDA   | cuDNN on Hopper and Blackwell: a subset of flash, see `_suits_cudnn` | O(S) |
| flash     | CUDA   | FlashAttention-2: half precision, no key mask             | O(S)        |
| efficient | CUDA   | memory-efficient attention: key masks, fp32               | O(S); O(S²) with a window |
| plain     | any    | matmul, softmax, matmul: dropout on CPU, odd head sizes   | O(S²)       |

The aten operators called here have kept these arguments across the supported torch versions. Causal masks are aligned
top left (query i sees keys 0..i), as in `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..isa.attention import RNG_BYTES, Problem
from ..isa.precision import accumulate_dtype
from .random_state import generator_of

aten = torch.ops.aten
Triple = tuple[Tensor, Tensor, Tensor]

_PHILOX_BYTES = 16  # a CUDA random state: 64-bit seed, 64-bit offset

CUDNN_ON = (9, 10)
"""Major compute capabilities that cuDNN has specialized attention kernels for.

With them a step of OPT-2.7B x 16 in 24 GiB takes 0.590 s on H100, with FlashAttention-2 0.623 s
(`benchmarks/step_time.py`).
"""

CUDNN_LENGTH = 128
"""Tokens from which on cuDNN is worth its planning time for every new shape."""


@dataclass(frozen=True)
class Saved:
    """What forward leaves for backward: out [B, H, Sq, Dv], logsumexp [B, H, Sq], rng uint8 bytes."""

    out: Tensor
    logsumexp: Tensor
    rng: Tensor


def route(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, problem: Problem) -> str:
    """The name of the kernel that runs this problem (see the table above); forward and backward must agree."""
    dim, square = query.shape[-1], query.shape[2] == key.shape[2]
    if dim != value.shape[-1] or min(query.numel(), key.numel()) == 0:
        return "plain"
    if query.device.type == "cpu":
        return "plain" if problem.dropout or problem.window else "cpu"
    if query.device.type != "cuda":
        return "plain"
    half = query.dtype in (torch.float16, torch.bfloat16)
    # The flash kernel aligns causal masks bottom right: the same only if square. It needs rows of whole 16 bytes.
    fits_flash = key_mask is None and dim % 8 == 0 and dim <= 256 and (square or not problem.causal)
    major = major_capability(query.device)
    if half and fits_flash and major >= 8:
        return "cudnn" if major in CUDNN_ON and _suits_cudnn(query, key, problem) else "flash"
    if (half and dim % 8 == 0) or (query.dtype == torch.float32 and dim % 4 == 0):
        return "efficient"
    return "plain"


@cache
def major_capability(device: torch.device) -> int:
    """Asked once: torch looks it up anew each time."""
    return torch.cuda.get_device_capability(device)[0]


def _suits_cudnn(query: Tensor, key: Tensor, problem: Problem) -> bool:
    """Whether cuDNN runs a problem that fits FlashAttention-2. Not if determinism is asked for: its gradients vary."""
    wanted = torch.backends.cuda.cudnn_sdp_enabled() and not torch.are_deterministic_algorithms_enabled()
    simple = problem.dropout == 0 and not problem.window and query.shape[-1] <= 128
    return wanted and simple and min(query.shape[2], key.shape[2]) >= CUDNN_LENGTH


def allowed(query: Tensor, key: Tensor, key_mask: Tensor | None, problem: Problem) -> Tensor | None:
    """Bool [B or 1, 1, Sq, Sk], True where a query sees a key; None if all see all. Materializes Sq x Sk."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if problem.causal:
        rows = torch.arange(query.shape[2], device=query.device)[:, None]
        columns = torch.arange(key.shape[2], device=query.device)[None, :]
        band = columns <= rows
        if problem.window:
            band = band & (columns > rows - problem.window)
        mask = band[None, None] if mask is None else mask & band
    return mask


def seeing_rows(key_mask: Tensor, queries: int, problem: Problem) -> Tensor:
    """Bool [B, Sq]: whether a query sees any key. Linear in Sq + Sk, by a running count of unmasked keys."""
    if not problem.causal:
        return key_mask.any(-1, keepdim=True).expand(-1, queries)
    count = torch.nn.functional.pad(key_mask.cumsum(-1), (1, 0))
    rows = torch.arange(queries, device=key_mask.device)
    last = (rows + 1).clamp(max=key_mask.shape[-1])
    first = (rows + 1 - problem.window).clamp(min=0) if problem.window else torch.zeros_like(rows)
    return count[:, last] > count[:, torch.minimum(first, last)]


def _bias(query: Tensor, key: Tensor, key_mask: Tensor | None, problem: Problem) -> tuple[Tensor | None, bool]:
    """An additive mask for the fused kernels, and whether the kernel itself must still apply the causal mask.

    Without a window the bias is one row per batch element, broadcast with zero strides: nothing is S x S.
    """
    if problem.window:
        mask, causal = allowed(query, key, key_mask, problem), False
    else:
        mask, causal = (None if key_mask is None else key_mask[:, None, None, :]), problem.causal
    if mask is None:
        return None, causal
    length = key.shape[2]
    # The CUDA kernel reads the bias in aligned groups of 16 elements, so rows are padded and then sliced.
    rows = query.new_zeros((*mask.shape[:-1], -(-length // 16) * 16))[..., :length]
    rows.masked_fill_(~mask, float("-inf"))
    if query.device.type == "cuda":
        rows = rows.expand(query.shape[0], query.shape[1], query.shape[2], length)
    return rows, causal


def cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch's flash attention for the CPU."""
    bias, causal = _bias(query, key, key_mask, problem)
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=problem.scale
    )
    return out, logsumexp, None


def cpu_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    saved: Saved,
    problem: Problem,
) -> Triple:
    """Gradients of `cpu_forward`."""
    bias, causal = _bias(tensors[0], tensors[1], key_mask, problem)
    grads: Triple = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *tensors, saved.out, saved.logsumexp, 0.0, causal, attn_mask=bias, scale=problem.scale
    )
    return grads


def cudnn_forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cuDNN's attention. It plans for every new shape, which takes up to a second."""
    results = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, problem.causal, False, scale=problem.scale
    )
    return results[0], results[1].squeeze(-1), None


def cudnn_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    saved: Saved,
    problem: Problem,
) -> Triple:
    """Gradients of `cudnn_forward`. Without dropout the random state is not read."""
    lengths, unused = (tensors[0].shape[2], tensors[1].shape[2]), saved.logsumexp.new_empty((), dtype=torch.int64)
    grads: Triple = aten._scaled_dot_product_cudnn_attention_backward(
        grad, *tensors, saved.out, saved.logsumexp.unsqueeze(-1), unused, unused, None, None, None, *lengths,
        0.0, problem.causal, scale=problem.scale,
    )  # fmt: skip
    return grads


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """FlashAttention-2; a window goes through the lower-level operator, whose layout is [B, S, H, D]."""
    lengths = (query.shape[2], key.shape[2])
    if problem.window:
        out, logsumexp, rng, _, _ = aten._flash_attention_forward(
            *(t.transpose(1, 2) for t in (query, key, value)), None, None, *lengths,
            problem.dropout, True, False,
            scale=problem.scale, window_size_left=problem.window - 1, window_size_right=0,
        )  # fmt: skip
        return out.transpose(1, 2), logsumexp, rng
    results = aten._scaled_dot_product_flash_attention(
        query, key, value, problem.dropout, problem.causal, False, scale=problem.scale
    )
    return results[0], results[1], results[6]


def flash_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    saved: Saved,
    problem: Problem,
) -> Triple:
    """Gradients of `flash_forward`. Without dropout the kernel takes a random state but does not read it."""
    lengths = (tensors[0].shape[2], tensors[1].shape[2])
    rng = saved.rng[:_PHILOX_BYTES] if problem.dropout else saved.rng.new_zeros(_PHILOX_BYTES)
    rng, unused = rng.view(torch.uint64), torch.empty((), dtype=torch.uint64, device=grad.device)
    if problem.window:
        grads = aten._flash_attention_backward(
            *(t.transpose(1, 2) for t in (grad, *tensors, saved.out)), saved.logsumexp, None, None, *lengths,
            problem.dropout, True, rng, unused,
            scale=problem.scale, window_size_left=problem.window - 1, window_size_right=0,
        )  # fmt: skip
        return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)
    result: Triple = aten._scaled_dot_product_flash_attention_backward(
        grad, *tensors, saved.out, saved.logsumexp, None, None, *lengths,
        problem.dropout, problem.causal, rng, unused, scale=problem.scale,
    )  # fmt: skip
    return result


def efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Memory-efficient attention. Its logsumexp is padded to 32 rows; we keep the real ones."""
    bias, causal = _bias(query, key, key_mask, problem)
    out, logsumexp, seed, offset = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, problem.dropout, causal, scale=problem.scale
    )
    rng = torch.stack((seed.view(()), offset.view(()))) if problem.dropout else None
    return out, logsumexp[..., : query.shape[2]], rng


def efficient_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    saved: Saved,
    problem: Problem,
) -> Triple:
    """Gradients of `efficient_forward`. With dropout the random state is read on the host, which synchronizes."""
    bias, causal = _bias(tensors[0], tensors[1], key_mask, problem)
    rows = grad.shape[2]
    logsumexp = torch.nn.functional.pad(saved.logsumexp, (0, -rows % 32), value=float("inf"))
    seed = offset = torch.zeros((), dtype=torch.int64)
    if problem.dropout:
        seed, offset = saved.rng[:_PHILOX_BYTES].cpu().view(torch.int64).unbind()
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad, *tensors, bias, saved.out, logsumexp, seed, offset,
        problem.dropout, [True, True, True, False], causal, scale=problem.scale,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


def _scores(query: Tensor, key: Tensor, key_mask: Tensor | None, problem: Problem) -> Tensor:
    # Scale both sides by the root, as torch's math kernel does, so that results agree bit for bit.
    root = math.sqrt(abs(problem.scale))
    dtype = accumulate_dtype(query.dtype)
    scores = torch.matmul(query.to(dtype) * math.copysign(root, problem.scale), key.to(dtype).mT * root)
    mask = allowed(query, key, key_mask, problem)
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def plain_forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Matmul, softmax, dropout, matmul, accumulated in fp32 (fp64 for fp64)."""
    scores = _scores(query, key, key_mask, problem)
    logsumexp = scores.logsumexp(-1)
    weights = aten._safe_softmax(scores, -1)
    rng = None
    if problem.dropout:
        generator = generator_of(query.device)
        rng = generator.get_state()
        weights = weights * _keep(weights, generator, problem.dropout)
    return torch.matmul(weights, value.to(weights.dtype)).to(query.dtype), logsumexp, rng


def _keep(weights: Tensor, generator: torch.Generator, dropout: float) -> Tensor:
    """0 where a weight is dropped, else 1 / (1 - dropout); draws the same numbers as torch's dropout."""
    if dropout == 1.0:
        return torch.zeros_like(weights)
    return torch.empty_like(weights).bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)


def plain_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    saved: Saved,
    problem: Problem,
) -> Triple:
    """Gradients from the logsumexp (the identities of FlashAttention, Dao et al. 2022, appendix B)."""
    query, key, value = (t.to(accumulate_dtype(t.dtype)) for t in tensors)
    weights = (_scores(query, key, key_mask, problem) - saved.logsumexp[..., None]).exp()
    grad = grad.to(weights.dtype)
    grad_weights, kept = torch.matmul(grad, value.mT), weights
    if problem.dropout:
        generator = torch.Generator(grad.device)
        size = _PHILOX_BYTES if grad.device.type == "cuda" else RNG_BYTES
        generator.set_state(saved.rng[:size].cpu())
        keep = _keep(weights, generator, problem.dropout)
        grad_weights, kept = grad_weights * keep, weights * keep
    delta = (grad * saved.out.to(grad.dtype)).sum(-1, keepdim=True)
    grad_scores = weights * (grad_weights - delta) * problem.scale
    grads = (torch.matmul(grad_scores, key), torch.matmul(grad_scores.mT, query), torch.matmul(kept.mT, grad))
    return grads[0].to(tensors[0].dtype), grads[1].to(tensors[1].dtype), grads[2].to(tensors[2].dtype)


FORWARD = {
    "cpu": cpu_forward,
    "cudnn": cudnn_forward,
    "flash": flash_forward,
    "efficient": efficient_forward,
    "plain": plain_forward,
}
BACKWARD = {
    "cpu": cpu_backward,
    "cudnn": cudnn_backward,
    "flash": flash_backward,
    "efficient": efficient_backward,
    "plain": plain_backward,
}
