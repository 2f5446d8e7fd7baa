"""A lowered program with all that the search reads of it."""

from collections.abc import Callable
from dataclasses import dataclass

from ...passes.program.plan import Plan
from ..lowering import Flat
from ..rates.rates import Rates
from .liveness import Liveness, analyse
from .memory import Limits, Memory
from .simulate import StepTime
from .timeline import Timeline, timeline


@dataclass(frozen=True)
class Weighed:
    """A lowered program with its liveness and timeline, none of which depends on where chunks live."""

    flat: Flat
    liveness: Liveness
    timeline: Timeline

    @classmethod
    def of(cls, flat: Flat, plan: Plan, rates: Rates) -> "Weighed":
        return cls(flat, analyse(flat.program), timeline(flat.program, plan, rates))

    def on(self, plan: Plan, limits: Limits) -> tuple[Memory, StepTime]:
        """The program's memory and step time, each a function of the chunks' homes."""
        return Memory(plan, self.liveness, limits), StepTime(self.timeline, limits.rates)


Lower = Callable[[Plan], Weighed]
"""Runs the passes over a copy of the captured program, until instructions are in their final place."""
