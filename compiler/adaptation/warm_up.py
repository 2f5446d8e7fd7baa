"""Warm-up, as Gemini has it: the first steps are measured, and the plan is decided again by what they took.

Homes alone may change then. They do where a step becomes shorter by more than it takes to be sure of that, states move
between two steps with every bit, and where the next steps are not as short as those before the move, they move back.
"""

from dataclasses import dataclass, replace

from ...passes.program.plan import Plan
from ...runtime.isa.homes import Homes
from ...runtime.isa.units import format_seconds
from ...runtime.memory.stats import Figures
from ..planner.correction import Measured, corrected
from ..planner.memory import Limits
from ..programs.programs import Key
from ..session import Session
from .rehoming import Plans, Rehoming
from .step_watch import StepWatch

GAIN = 0.03
"""The share of a step's time that other homes must save, by the model that the measured steps have corrected."""

MOST_SPREAD = 0.1
"""As much longer than the fastest a step may be for no other reason than chance."""

TRIES = 4
"""So often steps are measured again where other things ran in between."""


@dataclass(frozen=True)
class _Decision:
    """What rank 0 decides: the limits of the machine as it is, and other homes, where they pay."""

    limits: Limits
    homes: Homes | None


class WarmUp:
    """Of one model: `steps` are measured before the decision, and as many behind a move."""

    def __init__(self, session: Session, rehoming: Rehoming, steps: int) -> None:
        self.session, self.rehoming, self.steps = session, rehoming, steps
        self.watch = StepWatch(session, steps) if steps else None
        self._tries = TRIES
        self._before: tuple[Homes, float] | None = None  # a move, and how long a step may take behind it

    def spoil(self) -> None:
        if self.watch is not None:
            self.watch.spoil()

    def end(self) -> None:
        """Homes are decided by something else from here on."""
        if self.watch is not None:
            self.session.hardware.traffic.end()
            self.watch = None

    def call(self, key: Key, begins: bool) -> None:
        """A training step is called; on all processes, whose steps begin together."""
        if self.watch is None or not self.watch.call(key, begins):
            return
        watched, self.watch = self.watch, None
        if self._goes_on(key, watched):
            self.watch = StepWatch(self.session, self.steps)
            self.watch.call(key, begins)

    def _goes_on(self, key: Key, watched: StepWatch) -> bool:
        """What follows from steps that were watched on all processes. Returns whether more are to be."""
        own = watched.measured(key, self.session.programs()[key].plan.format.accumulate)
        told = self.session.ranks.gather((own, watched.spread))
        measured, spread = [one for one, _ in told if one is not None], max(spread for _, spread in told)
        if len(measured) < len(told):
            self._tries -= 1
            return self._tries > 0
        slowest = Measured.slowest(measured)
        self.session.stats.measured = Figures(slowest.step_s, slowest.peak_bytes)
        if self._before is None:
            return self._decide(key, slowest, min(MOST_SPREAD, max(GAIN, spread)))
        self._look_back(key, slowest, *self._before)
        return False

    def _decide(self, key: Key, measured: Measured, noise: float) -> bool:
        """Decide again. Returns whether homes have moved."""
        ranks, planning = self.session.ranks, self.session.planning
        decision = ranks.gather(self._decided(key, measured) if ranks.rank == 0 else None)[0]
        planning.limits = decision.limits
        now = self.rehoming.now[key]
        if decision.homes is not None and self._move(key, decision, measured):
            self._before = now.homes, measured.step_s * (1 + noise)
            return True
        self._take_note(self.rehoming.estimated(decision.limits), key, _measured(now, measured))
        return False

    def _decided(self, key: Key, measured: Measured) -> _Decision:
        compiled = self.session.programs()[key]
        limits = corrected(self.session.planning.limits, compiled.plan, compiled.flat, measured)
        chosen = self.rehoming.chosen(key, limits)
        plans = self.rehoming.plans(key, chosen.homes, limits)
        now_s, then_s = (self.rehoming.step_s(key, each, limits) for each in (self.rehoming.now, plans))
        pays = all(map(limits.allow, plans.values())) and then_s < now_s * (1 - GAIN)
        return _Decision(limits, chosen.homes if pays else None)

    def _move(self, key: Key, decision: _Decision, measured: Measured) -> bool:
        assert decision.homes is not None
        limits, now = decision.limits, self.rehoming.now[key]
        plans = self.rehoming.plans(key, decision.homes, limits)
        if not all(self.session.ranks.gather(all(map(limits.allow, plans.values())))):
            return False
        moved = sum(home != before for home, before in zip(decision.homes, now.homes, strict=True))
        then = f"{moved} chunk(s) have other homes since, for {format_seconds(plans[key].estimate.step_s)}"
        return self._take_note(plans, key, f"{_measured(now, measured)}; {then}")

    def _look_back(self, key: Key, measured: Measured, homes: Homes, most_s: float) -> None:
        """Behind a move: whether it was one for the better, or the homes from before are to be again."""
        if measured.step_s > most_s:
            plans = self.rehoming.plans(key, homes, self.session.planning.limits)
            self._take_note(plans, key, f"they took {format_seconds(measured.step_s)}, and chunks went back")

    def _take_note(self, plans: Plans, key: Key, note: str) -> bool:
        """Go on by these plans, the program's with one more note. Returns whether it could be done."""
        return self.rehoming.move(key, {**plans, key: replace(plans[key], notes=(*plans[key].notes, note))})


def _measured(plan: Plan, measured: Measured) -> str:
    took, modelled = format_seconds(measured.step_s), format_seconds(plan.estimate.step_s)
    return f"the first steps took {took}, where {modelled} were modelled"
