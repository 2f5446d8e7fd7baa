"""`geminifx::bernoulli_like`: what `Tensor.bernoulli_(p)` writes to a tensor of any layout.

Kernels that draw in place go through memory, so that which element gets which number depends on the tensor's strides.
torch's functional form of this one, `aten.bernoulli.p`, makes a contiguous result instead.
"""

import torch
from torch import Tensor

OPERATORS = ("bernoulli_like",)
"""What is defined here."""

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
