"""Memory and FLOPs that updates of whole parameters take on the device, beyond an element-wise pass over their
states."""

from .layout import ChunkLayout, Rule

WORKING_BYTES: dict[Rule, int] = {"elements": 0, "matrices": 24, "factored": 16}
"""Working bytes per element of the parameter: its master, gradient and update in float32, and intermediate results."""

ITERATIONS = 5
"""Newton-Schulz iterations of torch.optim.Muon's default, each of three matrix products."""


def working_bytes(chunk: ChunkLayout) -> int:
    """Bytes that the update of a chunk's longest parameter takes while it runs; 0 if parameters are not updated as a
    whole."""
    return chunk.longest_numel * WORKING_BYTES[chunk.rule] * chunk.is_whole


def flop(chunk: ChunkLayout) -> float:
    """FLOPs of the matrix products in a chunk's updates."""
    if chunk.rule != "matrices" or not chunk.is_whole:
        return 0.0
    sides = (sorted(slot.shape) for slot in chunk.slots)
    return float(sum(ITERATIONS * (4 * short**2 * long + 2 * short**3) for short, long in sides))
