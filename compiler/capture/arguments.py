"""What a program depends on in the arguments of a call."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.errors import ArgumentError
from .known import PLAIN


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


SAMPLE = 1024
"""Elements of each tensor by which one batch is told from another, in no time."""


def check_shared(ranks: Ranks, arguments: Any, *, every_element: bool) -> None:
    """Raises StateError where processes that share a batch are given different ones.

    Unless it is to look at `every_element`, it does at some, spread over each tensor, and waits for no device.
    """
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, Tensor) and (every_element or leaf.device.type == "cpu"):
            flat = leaf.detach().reshape(-1)
            some = flat if every_element else flat[:: max(1, flat.numel() // SAMPLE)]
            digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    ranks.check_batch(digest.hexdigest())
