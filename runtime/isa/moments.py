"""How an optimizer's moments are stored: exactly, as bfloat16, or as 8-bit codes with a scale per block; and how
masters are.

A stored moment is one flat tensor whose dtype identifies the format: the master's dtype is exact; bfloat16 is rounded
to nearest; uint8 holds blocks of `BLOCK` elements, each `BLOCK` codes followed by their float32 scale in four bytes.
`kernels.moments` defines the codes.
"""

from typing import Literal

import torch

Moments = Literal["exact", "bf16", "int8"]
Masters = Literal["exact", "bf16-stochastic"]
"""Masters as the compute weights and what these lack of them ("exact"), or as the compute weights alone, to which
updates are rounded stochastically ("bf16-stochastic")."""

BLOCK = 256
"""Elements that share a scale. Slots begin at multiples of it, so that no block is cut."""

_BLOCK_BYTES = BLOCK + torch.float32.itemsize


def stored_dtype(moments: Moments, master: torch.dtype) -> torch.dtype:
    """The dtype of the tensor that moments are stored in; `master` is the masters' dtype."""
    return {"exact": master, "bf16": torch.bfloat16, "int8": torch.uint8}[moments]


def unit(dtype: torch.dtype) -> int:
    """How many elements are stored and updated together, in a moment of this dtype."""
    return BLOCK if dtype == torch.uint8 else 1


def stored_numel(dtype: torch.dtype, numel: int) -> int:
    """How many elements of `dtype` a stored moment of `numel` values has."""
    return -(-numel // BLOCK) * _BLOCK_BYTES if dtype == torch.uint8 else numel


def stored_bytes(dtype: torch.dtype, numel: int) -> int:
    return stored_numel(dtype, numel) * dtype.itemsize


def update_bytes(moments: Moments) -> float:
    """Bytes that AdamW's update of one parameter reads and writes under bfloat16 compute: a weight, its remainder and
    two moments; the gradient is only read."""
    state_bytes = 2 + 2 + 2 * stored_bytes(stored_dtype(moments, torch.float32), BLOCK) / BLOCK
    return 2 * state_bytes + 2


def stored_at(dtype: torch.dtype, elements: slice) -> slice:
    """The slice of a stored moment that holds a slice of its values, which begins at a block."""
    return slice(stored_numel(dtype, elements.start), stored_numel(dtype, elements.stop))
