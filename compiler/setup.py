"""The setup of a model as one value, the declaration of its optimizer, and the phases it goes through."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import nn

from ..passes.program.plan import Plan
from ..runtime.isa.formats import OwnFormat
from ..runtime.isa.transitions import transition
from ..runtime.machine import Machine
from ..runtime.optimizer.chunk_optimizer import Attach
from ..runtime.optimizer.own_store import OwnStore


class Phase(Enum):
    """How far a model's setup has come."""

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
"""Legal transitions. A model returns to PLANNED for its first real batch, or for its own optimizer."""


def move(now: Phase, then: Phase) -> Phase:
    """Returns `then`. Raises IllegalTransition if a model cannot get there from `now`."""
    return transition(LEGAL, "a model", now, then)


@dataclass(frozen=True)
class Declaration:
    """The optimizer that `model.optimizer(...)` declared: the `format` of its training state, and `optimizer`, a weak
    reference by which it is given its store if it is still alive. `digest` must be the same on all ranks."""

    format: OwnFormat
    optimizer: Attach
    digest: str

    def attach(self, store: OwnStore) -> None:
        attach = self.optimizer()
        if attach is not None:
            attach(store)


@dataclass(frozen=True)
class Setup:
    """The plan in force, the machine that runs its programs, and `own`, our own optimizer's store, if there is one.

    `trained` names the parameters that were trained when this or an earlier plan was made, also those of other
    processes: there is memory for training them. `refusal` is the error that steps raise until `model.optimizer(...)`
    is called; None if they can run. A setup is replaced as a whole or not at all.
    """

    plan: Plan
    machine: Machine
    own: OwnStore | None = None
    refusal: Exception | None = None
    trained: frozenset[str] = frozenset()

    def lacks(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether parameters are trained now that no memory for training is planned for."""
        return any(parameter.requires_grad and name not in self.trained for name, parameter in parameters.items())
