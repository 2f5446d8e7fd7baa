"""Draws of a pipeline are those of a single process: every rank advances its generator through all of that process, and
saves its state in front of each stage's for each microbatch.
"""

from torch import fx

from ...runtime.isa.instructions import SAVE_RNG
from ..program.program import is_random, note
from .parts import Parts, drawn_apart
from .stages import Made, Stages


def draw_ahead(parts: Parts, stages: Stages) -> tuple[dict[Made, fx.Node], dict[tuple[int, int], fx.Node]]:
    """Writes the draws. Returns the states that the program itself saves, and those of stages, by stage and
    microbatch."""
    apart = drawn_apart(stages.program)
    drawing = [node for node in stages.program.computes if _draws(node, stages) and node not in apart]
    saved, states = dict[Made, fx.Node](), dict[tuple[int, int], fx.Node]()
    for microbatch in range(stages.plan.microbatches):
        state = None
        for node in drawing:
            if node.target is SAVE_RNG:
                saved[Made(node, microbatch)] = parts.save_state()
                continue
            stage = stages.stage[node]
            if state is None or (stage, microbatch) not in states:
                state = states[stage, microbatch] = parts.save_state()
            parts.draw(node, state)
    return saved, states


def _draws(node: fx.Node, stages: Stages) -> bool:
    """Whether a node draws, or saves the generator's state for a replay on any rank, in a forward that is needed."""
    is_kept = node.target is SAVE_RNG and node not in stages.stage
    return (is_random(node) or is_kept) and node in stages.needed and note(node).phase == "forward"
