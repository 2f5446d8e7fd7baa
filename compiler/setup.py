"""What a model is set up with, as one value, what its optimizer declared, and the phases it passes through."""

from dataclasses import dataclass
from enum import Enum

from ..passes.program.plan import Plan
from ..runtime.isa.formats import OwnFormat
from ..runtime.isa.transitions import transition
from ..runtime.machine import Machine
from ..runtime.optimizer.chunk_optimizer import Attach
from ..runtime.optimizer.own_store import OwnStore


class Phase(Enum):
    """How far a model has come."""

    NEW = "no program was asked for"
    PLANNED = "there is a plan, and values are where they were"
    PLACED = "values are where the plan wants them"
    TRAINING = "a training step was taken: where states lie is settled"
    BROKEN = "values were to move, and some found no room"


LEGAL: dict[Phase, frozenset[Phase]] = {
    Phase.NEW: frozenset({Phase.PLANNED}),
    Phase.PLANNED: frozenset({Phase.PLANNED, Phase.PLACED, Phase.BROKEN}),
    Phase.PLACED: frozenset({Phase.PLANNED, Phase.TRAINING, Phase.BROKEN}),
    Phase.TRAINING: frozenset({Phase.TRAINING, Phase.PLANNED, Phase.BROKEN}),
    Phase.BROKEN: frozenset(),
}
"""From PLACED or TRAINING back to PLANNED: for the first real batch, or for the model's own optimizer."""


def move(now: Phase, then: Phase) -> Phase:
    """Raises IllegalTransition where there is no such way."""
    return transition(LEGAL, "a model", now, then)


@dataclass(frozen=True)
class Declaration:
    """What `model.optimizer(...)` declared. That optimizer is given the store of its states, if it is still there.
    `digest` tells it from others, which some ranks may have declared."""

    format: OwnFormat
    optimizer: Attach
    digest: str

    def attach(self, store: OwnStore) -> None:
        attach = self.optimizer()
        if attach is not None:
            attach(store)


@dataclass(frozen=True)
class Setup:
    """The plan in force, the machine that runs its programs, and, where that is our own optimizer's, its store.

    `refusal` is why steps are refused until `model.optimizer(...)` is called, where they are. A setup is replaced as a
    whole or not at all.
    """

    plan: Plan
    machine: Machine
    own: OwnStore | None = None
    refusal: Exception | None = None
