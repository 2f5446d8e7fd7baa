"""What a plan is adapted to in training: to what its first steps took, and to the memory that there is."""

from collections.abc import Callable
from typing import Any, TypeVar

from ...runtime.machine import Machine
from ..programs.programs import Compiled
from ..session import Session
from .pressure import Pressure
from .rehoming import Rehoming
from .warm_up import WarmUp

T = TypeVar("T")


class Adaptation:
    """Of one model, whose calls it is told of before they run."""

    def __init__(self, session: Session) -> None:
        self.session, self.rehoming = session, Rehoming(session)
        self.pressure = Pressure(session, self.rehoming)
        self.warm_up = self._warm_up()
        self._machine: Machine | None = None  # that the warm-up is of

    def _warm_up(self) -> WarmUp:
        session = self.session
        steps = session.options.warmup_steps if session.planning.adapts else 0
        return WarmUp(session, self.rehoming, steps)

    def before(self, compiled: Compiled) -> None:
        """A program is about to run: between two of the optimizer's steps states may move."""
        if not compiled.trains:
            self.warm_up.spoil()
            return
        key, machine = self.rehoming.key_of(compiled), self.session.demanded().machine
        if machine is not self._machine:  # the model has an optimizer of its own since
            self.warm_up.end()
            self._machine, self.warm_up = machine, self._warm_up()
        begins = machine.store.is_between_steps
        if begins and self.pressure.call(key):
            self.warm_up.end()
        self.warm_up.call(key, begins)

    def forward(self, compiled: Compiled, arguments: Any, forward: Callable[[], T]) -> T:
        """What a training step's forward returns, which may have to run more than once."""
        key, was_shrunk = self.rehoming.key_of(compiled), self.pressure.is_shrunk
        found = self.pressure.withstood(key, arguments, forward)
        if self.pressure.is_shrunk != was_shrunk:
            self.warm_up.end()
        return found
