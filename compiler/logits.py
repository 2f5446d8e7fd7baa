"""What the logits of a captured step would take, and which outputs a lowered one leaves out."""

from ..passes.canonicalize import canonicalize
from ..passes.losses import find_losses
from ..passes.plan import Plan
from ..passes.program import Program, type_of
from ..passes.types import TensorType
from ..runtime.linear_loss import ABSENT
from ..runtime.ops import TURN

COPIES = 3
"""Logarithms of probabilities, the gradient of each, and that of the logits: all there at the loss's backward."""


def logits_bytes(captured: Program) -> int:
    """Device bytes that computing the losses in pieces would save at their highest point; 0 if it cannot be done."""
    program = captured.copy()
    canonicalize.rewrite(program, Plan())
    types = (type_of(loss.nll.args[0]) for loss in find_losses(program))
    return sum(COPIES * t.num_bytes for t in types if isinstance(t, TensorType))


def absent_outputs(program: Program) -> frozenset[int]:
    """Positions of outputs that a lowered training program does not compute."""
    outputs = (node for turn in program.calls(TURN) for node in turn.args[0])
    return frozenset(i for i, node in enumerate(outputs) if node.target is ABSENT)
