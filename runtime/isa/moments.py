"""How an optimizer's moments are stored: as they are, as bfloat16, or as 8-bit codes of which blocks share a scale; and
how masters are.

A stored moment is one flat tensor, whose dtype tells how: the master's is exact; bfloat16 is rounded to nearest; uint8
holds blocks of `BLOCK` elements, each `BLOCK` codes and then, in four bytes, their scale. What codes mean is for
`kernels.moments` to say.
"""

from typing import Literal

import torch

Moments = Literal["exact", "bf16", "int8"]
Masters = Literal["exact", "bf16-stochastic"]
"""Exactly, by what the weights that compute lack of them; or as those alone, to which updates are rounded by chance."""

BLOCK = 256
"""Elements that share a scale. Slots begin at multiples of it, and no block is cut."""

_BLOCK_BYTES = BLOCK + torch.float32.itemsize


def stored_dtype(moments: Moments, master: torch.dtype) -> torch.dtype:
    """The dtype of the tensor that such moments are stored in."""
    return {"exact": master, "bf16": torch.bfloat16, "int8": torch.uint8}[moments]


def unit(dtype: torch.dtype) -> int:
    """How many elements are stored, and updated, together."""
    return BLOCK if dtype == torch.uint8 else 1


def stored_numel(dtype: torch.dtype, numel: int) -> int:
    """How many elements of its dtype a stored moment of `numel` values has."""
    return -(-numel // BLOCK) * _BLOCK_BYTES if dtype == torch.uint8 else numel


def stored_bytes(dtype: torch.dtype, numel: int) -> int:
    return stored_numel(dtype, numel) * dtype.itemsize


def update_bytes(moments: Moments) -> float:
    """What AdamW's update of one parameter reads and writes where bfloat16 computes: a weight, its remainder, and two
    moments; a gradient is only read."""
    state_bytes = 2 + 2 + 2 * stored_bytes(stored_dtype(moments, torch.float32), BLOCK) / BLOCK
    return 2 * state_bytes + 2


def stored_at(dtype: torch.dtype, elements: slice) -> slice:
    """Where in a stored moment a slice of its values lies, which begins with a block."""
    return slice(stored_numel(dtype, elements.start), stored_numel(dtype, elements.stop))
