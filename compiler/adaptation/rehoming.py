"""Changes the homes of chunks during training, for all programs of a model and on all processes together."""

from collections.abc import Mapping
from dataclasses import replace

from ...passes.program.plan import Plan
from ...runtime.isa.errors import BudgetError
from ...runtime.isa.homes import Homes
from ..planner.memory import Limits
from ..planner.search import rehomed
from ..planner.solution import estimated
from ..programs.agreement import shared_homes
from ..programs.programs import Compiled, Key
from ..session import Session
from ..setup import Phase

Plans = Mapping[Key, Plan]
"""A plan for each program."""


class Rehoming:
    """Chooses homes for one program, the training step's, and makes the others follow. The programs themselves do not
    change: they do not depend on the homes of their chunks."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.failure = "it does not fit another process"  # why the last move was not made

    @property
    def now(self) -> Plans:
        return {key: compiled.plan for key, compiled in self.session.programs().items()}

    def key_of(self, compiled: Compiled) -> Key:
        return next(key for key, each in self.session.programs().items() if each.executor is compiled.executor)

    def chosen(self, key: Key, limits: Limits) -> Plan:
        """The program's plan with the best homes within these limits, or, if it does not fit, with the least on the
        device. Chunks whose masters a torch optimizer updates keep their homes."""
        compiled = self.session.programs()[key]
        placed = None if compiled.plan.format.beside else compiled.plan.homes
        return rehomed(compiled.plan, compiled.flat, limits, placed).plan

    def plans(self, key: Key, homes: Homes, limits: Limits) -> dict[Key, Plan]:
        """Plans for all programs, given that the plan of `key` has these homes. The others keep as many of their
        weights on the device as they have room for."""
        compiled = self.session.programs()[key]
        mine = estimated(replace(compiled.plan, homes=homes), compiled.flat, limits).plan
        return {**self.following(homes, limits), key: mine}

    def following(self, homes: Homes, limits: Limits) -> dict[Key, Plan]:
        """Plans for all programs with states where these homes say. Each keeps as many of its weights on the device as
        it has room for."""
        programs = self.session.programs().items()
        return {key: rehomed(compiled.plan, compiled.flat, limits, homes).plan for key, compiled in programs}

    def estimated(self, limits: Limits) -> dict[Key, Plan]:
        """The present plans, with estimates made anew within these limits."""
        programs = self.session.programs().items()
        return {key: estimated(compiled.plan, compiled.flat, limits).plan for key, compiled in programs}

    def step_s(self, key: Key, plans: Plans, limits: Limits) -> float:
        """The estimated seconds of a step by these plans. Weights stay on the device only if all programs have room for
        them."""
        homes = shared_homes(plans[key], plans.values())
        plan = replace(plans[key], homes=homes)
        return estimated(plan, self.session.programs()[key].flat, limits).plan.estimate.step_s

    def move(self, key: Key, plans: Plans) -> bool:
        """Switches to these plans, on all processes or on none. Returns whether that worked. Raises, on all processes,
        if one of them can use neither these plans nor the ones before."""
        before, is_moved, ranks = self.now, True, self.session.ranks
        with ranks.failing_alike():
            try:
                self.session.rehome(plans, key)
            except BudgetError as error:
                if self.session.phase is Phase.BROKEN:
                    raise
                is_moved, self.failure = False, str(error)
        if all(ranks.gather(is_moved)):
            return True
        with ranks.failing_alike():
            if is_moved:
                self.session.rehome(before, key)
        return False
