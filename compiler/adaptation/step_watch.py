"""Measures training steps: how long they take, and for how long of that copies and the host's updates run."""

from dataclasses import dataclass
from itertools import pairwise

from ...runtime.memory.traffic import Direction, Moment, moment, seconds
from ..planner.correction import MeasuredStep
from ..programs.programs import Key
from ..session import Session

FIRST = 1
"""How many steps pass before measuring: libraries load in the first, and the first after a move allocates memory."""


@dataclass
class _Step:
    """When a step began, and the keys of the programs called in it."""

    begin: Moment
    calls: list[Key]


class StepWatch:
    """Skips `FIRST` steps, then measures `count` steps, each from its first call to the first call of the next."""

    def __init__(self, session: Session, count: int) -> None:
        self.session, self.count = session, count
        self.spread = 0.0
        self._steps: list[_Step] = []
        self._is_spoilt = False
        self._copied_s = dict.fromkeys(Direction, 0.0)
        self._updating_s = 0.0
        self._peak_bytes = 0

    def call(self, key: Key, begins: bool) -> bool:
        """Called for each training program that runs; `begins` says whether an optimizer's step begins with it. Returns
        whether all steps are measured."""
        session = self.session
        store, traffic = session.demanded().machine.store, session.hardware.traffic
        if self._steps:  # the call before the first is not of these steps
            self._peak_bytes = max(self._peak_bytes, session.stats.step.device_peak_bytes)
        if begins or not self._steps:
            self._steps.append(_Step(moment(session.device.is_cuda), []))
            if len(self._steps) == FIRST + 1:
                traffic.begin()
                self._updating_s = -store.host_update_s
            elif len(self._steps) == FIRST + 1 + self.count:
                self._copied_s = traffic.end()
                self._updating_s += store.host_update_s
                return True
        self._steps[-1].calls.append(key)
        return False

    def spoil(self) -> None:
        """Called when something other than training steps runs: the measurement is void, and copies are no longer
        timed."""
        if len(self._steps) > FIRST:
            self._is_spoilt = True
            self.session.hardware.traffic.end()

    def measured(self, key: Key, runs: int) -> MeasuredStep | None:
        """A step of `runs` calls of this program: the time of the fastest, as others may use the machine, the average
        times of copies and of the host's updates, and the peak. None if any step measured was a different one."""
        steps = self._steps[FIRST:]
        if self._is_spoilt or any(step.calls != [key] * runs for step in steps[:-1]):
            return None
        taken_s = [seconds(one.begin, then.begin) for one, then in pairwise(steps)]
        self.spread = max(taken_s) / min(taken_s) - 1
        copied_s = {direction: copied_s / self.count for direction, copied_s in self._copied_s.items()}
        return MeasuredStep(
            min(taken_s),
            copied_s[Direction.UP],
            copied_s[Direction.DOWN],
            self._updating_s / self.count,
            self._peak_bytes,
        )
