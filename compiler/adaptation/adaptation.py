"""Adapts a plan during training to what its first steps took, and to the memory there is."""

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
    """The adaptation of one model. `before` is called ahead of each of its programs, `forward` runs a training
    forward."""

    def __init__(self, session: Session) -> None:
        self.session, self.rehoming = session, Rehoming(session)
        self.pressure = Pressure(session, self.rehoming)
        self.warm_up = self._warm_up()
        self._machine: Machine | None = None  # the machine that the warm-up measures

    def _warm_up(self) -> WarmUp:
        session = self.session
        steps = session.options.warmup_steps if session.planning.adapts else 0
        return WarmUp(session, self.rehoming, steps)

    def before(self, compiled: Compiled) -> None:
        """Called before a program runs. States may move here, between two steps of the optimizer."""
        if not compiled.trains:
            self.warm_up.spoil()
            return
        key, machine = self.rehoming.key_of(compiled), self.session.demanded().machine
        if machine is not self._machine:  # the model has got an optimizer of its own
            self.warm_up.end()
            self._machine, self.warm_up = machine, self._warm_up()
        begins = machine.store.is_between_steps
        if begins and self.pressure.call(key):
            self.warm_up.end()
        self.warm_up.call(key, begins)

    def forward(self, compiled: Compiled, arguments: Any, forward: Callable[[], T]) -> T:
        """Runs a training step's forward, more than once if memory runs out, and returns its result."""
        key, was_shrunk = self.rehoming.key_of(compiled), self.pressure.is_shrunk
        found = self.pressure.withstood(key, arguments, forward)
        if self.pressure.is_shrunk != was_shrunk:
            self.warm_up.end()
        return found
