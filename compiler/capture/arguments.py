"""What a program depends on in the arguments of a call."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.errors import ArgumentError
from .guards import PLAIN


def leaf_key(leaf: Any, is_input: bool = False) -> Any:
    """What a program depends on in one argument: a tensor's kind, a number's that is an input, anything else's value.

    Raises ArgumentError for objects whose contents cannot be told: they would be baked in as they are now.
    """
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad
    if is_input:
        return type(leaf), "an input"
    if isinstance(leaf, PLAIN):
        return type(leaf), repr(leaf) if isinstance(leaf, float) else leaf
    raise ArgumentError(
        f"an argument is a {type(leaf).__name__}, whose contents a compiled program cannot follow from call to call; "
        "expected tensors, numbers, strings, None, and tuples, lists, dicts or registered pytree classes of them "
        "(torch.from_numpy makes a tensor of an array)"
    )


def check_shared(ranks: Ranks, inputs: list[Any]) -> None:
    """Raises StateError where processes that share a batch are given different tensors; calls tell the numbers."""
    digest = hashlib.sha256()
    for tensor in filter(torch.is_tensor, inputs):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    ranks.check_batch(digest.hexdigest())
