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
    """What a program depends on in an argument: a tensor's metadata, an input number's type, anything else's value.

    Raises ArgumentError for objects whose contents are unknown: they would be baked in as they are now.
    """
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad
    if is_input:
        return type(leaf), "an input"
    if isinstance(leaf, PLAIN):
        return type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf
    raise ArgumentError(
        f"an argument is a {type(leaf).__name__}, whose contents a compiled program cannot follow from call to call; "
        "expected tensors, numbers, strings, None, and tuples, lists, dicts or registered pytree classes of them "
        "(torch.from_numpy makes a tensor of an array)"
    )


SAMPLE = 1024
"""Roughly how many elements of each tensor are hashed to tell one batch from another quickly."""


def check_shared(ranks: Ranks, arguments: Any, *, every_element: bool) -> None:
    """Raises StateError if processes that should share a batch are given different ones.

    Unless `every_element` is set, only a sample spread over each CPU tensor is hashed, and no device is waited for.
    """
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, Tensor) and (every_element or leaf.device.type == "cpu"):
            flat = leaf.detach().reshape(-1)
            some = flat if every_element else flat[:: max(1, flat.numel() // SAMPLE)]
            digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    ranks.check_batch(digest.hexdigest())
