"""Room for a batch that is larger than those before it: training states that were placed for these move to where the
larger one wants them.

A further program is planned with states where they are. If it does not fit so, it is planned as if it were the first,
and states move between two steps of the optimizer, as long as all earlier programs fit with them there, too.
"""

from dataclasses import replace

from ...passes.program.plan import Plan
from ...runtime.isa.errors import BudgetError
from ..capture.trace import Captured
from ..programs.programs import Compiled, Key
from ..session import Session
from ..setup import Phase
from .rehoming import Plans, Rehoming

LARGEST_FIRST = ". Training states are placed for the first batch: begin with the largest batch"
"""What helps where a batch fits only if it comes first."""


class MakingRoom:
    """Makes room for further programs of one model, if its homes may change and no other processes would have to move
    with it."""

    def __init__(self, session: Session, rehoming: Rehoming) -> None:
        self.session, self.rehoming = session, rehoming

    def call(self, key: Key, captured: Captured, refusal: BudgetError) -> bool:
        """Called when a further program is refused with states where they are. Returns whether these have moved and the
        program is there; otherwise nothing has changed, and the refusal tells what helps. Raises another refusal if the
        program would not fit as the first one either."""
        session, planning = self.session, self.session.planning
        if not captured.trains or not planning.adapts or planning.agreed is not None:
            return False
        try:
            further = session.builder.moving(captured, session.demanded(), session.format)
        except BudgetError as error:
            if not self._may_move:  # the smallest budget that it names is that of a first batch
                error.args = (f"{error}{LARGEST_FIRST}",)
            raise error from None
        plans = self._plans(key, further) if self._may_move else None
        if plans is not None and self._moved(key, further, plans):
            return True
        refusal.args = (f"{refusal}{LARGEST_FIRST}",)
        return False

    @property
    def _may_move(self) -> bool:
        """Masters that a torch optimizer updates stay where they are, and so does all for which values are due."""
        session = self.session
        is_settled = session.format is not None and session.places.incoming is None
        return is_settled and not session.ranks.together and session.store().is_between_steps

    def _plans(self, key: Key, further: Compiled) -> Plans | None:
        """Plans for all programs with the homes that a further one wants; None if one of them no longer fits."""
        limits = self.session.planning.limits
        plans = {**self.rehoming.following(further.plan.homes, limits), key: self._noted(further.plan)}
        return plans if all(map(limits.allow, plans.values())) else None

    def _noted(self, plan: Plan) -> Plan:
        """The plan, with a note of what moves for it."""
        now = self.session.demanded().plan.homes
        moved = sum(home.where is not before.where for home, before in zip(plan.homes, now, strict=True))
        return replace(plan, notes=(*plan.notes, f"{moved} chunk(s) were moved to other homes for a larger batch"))

    def _moved(self, key: Key, further: Compiled, plans: Plans) -> bool:
        """Moves states and adds the program. Returns False if a tier was full, and nothing has changed."""
        try:
            self.session.rehome(plans, key, further)
        except BudgetError:
            if self.session.phase is Phase.BROKEN:
                raise
            return False
        return True
