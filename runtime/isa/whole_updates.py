"""Memory and FLOPs that updates of whole parameters take on the device, beyond an element-wise pass over their
states."""

import torch

from .layout import ChunkLayout, Rule
from .moments import Masters

WORKING_BYTES: dict[Rule, int] = {"elements": 0, "matrices": 24, "factored": 16}
"""Working bytes per element of the parameter: its master, gradient and update in float32, and intermediate results."""

ROUNDING_BYTES = 20
"""Working bytes per element while a float32 master is rounded stochastically: itself and two integers of 8 bytes."""

ITERATIONS = 5
"""Newton-Schulz iterations of torch.optim.Muon's default, each of three matrix products."""


def working_bytes(chunk: ChunkLayout, masters: Masters) -> int:
    """Bytes that the update of a chunk's longest parameter takes while it runs; 0 if parameters are not updated as a
    whole."""
    if not chunk.is_whole:
        return 0
    per_element = WORKING_BYTES[chunk.rule] * chunk.master_dtype.itemsize // torch.float32.itemsize
    if chunk.splits and masters != "exact":
        per_element = max(per_element, ROUNDING_BYTES)
    return chunk.longest_numel * per_element


def flop(chunk: ChunkLayout) -> float:
    """FLOPs of the matrix products in a chunk's updates."""
    if chunk.rule != "matrices" or not chunk.is_whole:
        return 0.0
    sides = (sorted(slot.shape) for slot in chunk.slots)
    return float(sum(ITERATIONS * (4 * short**2 * long + 2 * short**3) for short, long in sides))
