"""How long training steps take as they come, and what of that copies and the host's updates are."""

from dataclasses import dataclass
from itertools import pairwise

from ...runtime.memory.traffic import Direction, Moment, moment, seconds
from ..planner.correction import Measured
from ..programs.programs import Key
from ..session import Session

FIRST = 1
"""Steps that are not measured: libraries load in the first one, and memory is taken by the first behind a move."""


@dataclass
class _Step:
    """When a step began, and the programs of its calls."""

    begin: Moment
    calls: list[Key]


class StepWatch:
    """Watches one step that does not count and `count` behind it, from the first call of one to that of the next."""

    def __init__(self, session: Session, count: int) -> None:
        self.session, self.count = session, count
        self.spread = 0.0
        self._steps: list[_Step] = []
        self._is_spoilt = False
        self._copied_s = dict.fromkeys(Direction, 0.0)
        self._updating_s = 0.0
        self._peak_bytes = 0

    def call(self, key: Key, begins: bool) -> bool:
        """A training step is called, as the first call of an optimizer's step or not. Returns whether all that is to be
        measured was."""
        session = self.session
        store, traffic = session.demanded().machine.store, session.hardware.traffic
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
        """Something else ran beside the training steps: nothing is to be learned of them, and no copies are timed."""
        if len(self._steps) > FIRST:
            self._is_spoilt = True
            self.session.hardware.traffic.end()

    def measured(self, key: Key, runs: int) -> Measured | None:
        """What a step of so many runs of this program takes: the fastest, since others may use the machine, too. None
        where not all of them were such steps."""
        steps = self._steps[FIRST:]
        if self._is_spoilt or any(step.calls != [key] * runs for step in steps[:-1]):
            return None
        taken_s = [seconds(one.begin, then.begin) for one, then in pairwise(steps)]
        self.spread = max(taken_s) / min(taken_s) - 1
        copied_s = {direction: copied_s / self.count for direction, copied_s in self._copied_s.items()}
        return Measured(
            min(taken_s),
            copied_s[Direction.UP],
            copied_s[Direction.DOWN],
            self._updating_s / self.count,
            self._peak_bytes,
        )
