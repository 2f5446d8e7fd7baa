"""`geminifx::bernoulli_like`: what `Tensor.bernoulli_(p)` writes into a tensor of any layout.

Kernels that draw in place traverse memory in order, so the strides decide which element gets which number. torch's
functional form, `aten.bernoulli.p`, returns a contiguous tensor instead.
"""

import torch
from torch import Tensor

OPERATORS = ("bernoulli_like",)
"""The operators defined in this module."""

torch.library.define(
    "geminifx::bernoulli_like",
    "(Tensor like, float p) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)


@torch.library.register_fake("geminifx::bernoulli_like")
def _empty(like: Tensor, p: float) -> Tensor:
    return like.new_empty_strided(like.shape, like.stride())


@torch.library.impl("geminifx::bernoulli_like", "CompositeExplicitAutograd")
def _drawn(like: Tensor, p: float) -> Tensor:
    return _empty(like, p).bernoulli_(p)
