"""What updates of whole parameters take of the device, beside passing over their states once."""

from .layout import ChunkLayout, Rule

WORKING_BYTES: dict[Rule, int] = {"elements": 0, "matrices": 24, "factored": 16}
"""Of each element of the parameter: its master, gradient and update in float32, and what comes in between."""

ITERATIONS = 5
"""Of Newton and Schulz, by torch.optim.Muon's default. Each is three products of matrices."""


def working_bytes(chunk: ChunkLayout) -> int:
    """What the update of a chunk's longest parameter takes while it runs; 0 where none is updated as a whole."""
    return chunk.longest_numel * WORKING_BYTES[chunk.rule] * chunk.is_whole


def flop(chunk: ChunkLayout) -> float:
    """What a chunk's updates multiply."""
    if chunk.rule != "matrices" or not chunk.is_whole:
        return 0.0
    sides = (sorted(slot.shape) for slot in chunk.slots)
    return float(sum(ITERATIONS * (4 * short**2 * long + 2 * short**3) for short, long in sides))
