"""Warm-up, as in Gemini: measures the first steps, and decides the plan again from what they took.

Only homes may change. They do if that saves a larger share of a step's time than `GAIN`. States move bit for bit,
between two steps; if the steps after the move are longer than those before it, by more than chance, they move back.
"""

from dataclasses import dataclass, replace

from ...passes.program.plan import Plan
from ...runtime.isa.homes import Homes
from ...runtime.isa.units import format_seconds
from ...runtime.memory.stats import Figures
from ..planner.correction import MeasuredStep, corrected
from ..planner.memory import Limits
from ..programs.programs import Key
from ..session import Session
from .rehoming import Plans, Rehoming
from .step_watch import StepWatch

GAIN = 0.03
"""The share of a step's time that new homes must save, by the model as corrected with the measured steps."""

MOST_SPREAD = 0.1
"""The most that chance is taken to lengthen a step, as a share of the fastest."""

TRIES = 4
"""How many times steps are measured at most, if other work keeps interfering."""


@dataclass(frozen=True)
class _Decision:
    """The decision of rank 0: the limits of the machine as corrected, and new homes, or None if those do not pay."""

    limits: Limits
    homes: Homes | None


class WarmUp:
    """The warm-up of one model: `steps` steps are measured before the decision, and as many after a move."""

    def __init__(self, session: Session, rehoming: Rehoming, steps: int) -> None:
        self.session, self.rehoming, self.steps = session, rehoming, steps
        self.watch = StepWatch(session, steps) if steps else None
        self._tries = TRIES
        self._before: tuple[Homes, float] | None = None  # homes before a move, and the longest step that justifies it

    def spoil(self) -> None:
        if self.watch is not None:
            self.watch.spoil()

    def end(self) -> None:
        """Stops measuring, because something else decides the homes from here on."""
        if self.watch is not None:
            self.session.hardware.traffic.end()
            self.watch = None

    def call(self, key: Key, begins: bool) -> None:
        """Called for each training program that runs, on all processes; their steps begin together."""
        if self.watch is None or not self.watch.call(key, begins):
            return
        watched, self.watch = self.watch, None
        if self._goes_on(key, watched):
            self.watch = StepWatch(self.session, self.steps)
            self.watch.call(key, begins)

    def _goes_on(self, key: Key, watched: StepWatch) -> bool:
        """Acts on the steps that all processes have measured. Returns whether to measure more."""
        own = watched.measured(key, self.session.programs()[key].plan.format.accumulate)
        told = self.session.ranks.gather((own, watched.spread))
        measured, spread = [one for one, _ in told if one is not None], max(spread for _, spread in told)
        if len(measured) < len(told):
            self._tries -= 1
            return self._tries > 0
        slowest = MeasuredStep.slowest(measured)
        self.session.stats.measured = Figures(slowest.step_s, slowest.peak_bytes)
        if self._before is None:
            return self._decide(key, slowest, min(MOST_SPREAD, max(GAIN, spread)))
        self._look_back(key, slowest, *self._before)
        return False

    def _decide(self, key: Key, measured: MeasuredStep, noise: float) -> bool:
        """Decides the plan again. Returns whether homes have changed."""
        ranks, planning = self.session.ranks, self.session.planning
        decision = ranks.gather(self._decided(key, measured) if ranks.rank == 0 else None)[0]
        planning.limits = decision.limits
        now = self.rehoming.now[key]
        if decision.homes is not None and self._move(key, decision, measured):
            self._before = now.homes, measured.step_s * (1 + noise)
            return True
        self._take_note(self.rehoming.estimated(decision.limits), key, _measured(now, measured))
        return False

    def _decided(self, key: Key, measured: MeasuredStep) -> _Decision:
        limits = self._corrected(key, measured)
        chosen = self.rehoming.chosen(key, limits)
        plans = self.rehoming.plans(key, chosen.homes, limits)
        now_s, then_s = (self.rehoming.step_s(key, each, limits) for each in (self.rehoming.now, plans))
        pays = all(map(limits.allow, plans.values())) and then_s < now_s * (1 - GAIN)
        return _Decision(limits, chosen.homes if pays else None)

    def _move(self, key: Key, decision: _Decision, measured: MeasuredStep) -> bool:
        assert decision.homes is not None
        limits, now = decision.limits, self.rehoming.now[key]
        plans = self.rehoming.plans(key, decision.homes, limits)
        if not all(self.session.ranks.gather(all(map(limits.allow, plans.values())))):
            return False
        moved = sum(home != before for home, before in zip(decision.homes, now.homes, strict=True))
        then = f"{moved} chunk(s) were moved to other homes, for {format_seconds(plans[key].estimate.step_s)}"
        return self._take_note(plans, key, f"{_measured(now, measured)}; {then}")

    def _look_back(self, key: Key, measured: MeasuredStep, homes: Homes, most_s: float) -> None:
        """After a move, restores the homes before it unless steps are at most `most_s` seconds; then the plan expects
        what they took."""
        ranks, planning, took = self.session.ranks, self.session.planning, format_seconds(measured.step_s)
        if measured.step_s > most_s:
            plans = self.rehoming.plans(key, homes, planning.limits)
            self._take_note(plans, key, f"steps then took {took}, so the chunks were moved back")
            return
        planning.limits = ranks.gather(self._corrected(key, measured) if ranks.rank == 0 else planning.limits)[0]
        self._take_note(self.rehoming.estimated(planning.limits), key, f"steps then took {took}")

    def _corrected(self, key: Key, measured: MeasuredStep) -> Limits:
        compiled = self.session.programs()[key]
        return corrected(self.session.planning.limits, compiled.plan, compiled.flat, measured)

    def _take_note(self, plans: Plans, key: Key, note: str) -> bool:
        """Switches to these plans, with a note added to the program's. Returns whether that worked."""
        return self.rehoming.move(key, {**plans, key: replace(plans[key], notes=(*plans[key].notes, note))})


def _measured(plan: Plan, measured: MeasuredStep) -> str:
    took, modelled = format_seconds(measured.step_s), format_seconds(plan.estimate.step_s)
    return f"the first steps took {took} (the plan expected {modelled})"
