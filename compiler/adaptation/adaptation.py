"""Adapts a plan during training to what its first steps took, to the memory there is, and to larger batches."""

from collections.abc import Callable
from typing import Any, TypeVar

from ...runtime.isa.errors import BudgetError
from ...runtime.machine import Machine
from ..capture.trace import Captured
from ..programs.programs import Compiled, Key
from ..session import Session
from .making_room import MakingRoom
from .pressure import Pressure
from .rehoming import Rehoming
from .warm_up import WarmUp

T = TypeVar("T")


class Adaptation:
    """The adaptation of one model. `makes_room` is called for a program that does not fit, `before` ahead of each
    program, and `forward` runs a training forward."""

    def __init__(self, session: Session) -> None:
        self.session, self.rehoming = session, Rehoming(session)
        self.pressure = Pressure(session, self.rehoming)
        self.making_room = MakingRoom(session, self.rehoming)
        self.warm_up = self._warm_up()
        self._measured: tuple[Machine, frozenset[str]] | None = None  # what runs and is trained in the warm-up

    def _warm_up(self) -> WarmUp:
        session = self.session
        steps = session.options.warmup_steps if session.planning.adapts else 0
        return WarmUp(session, self.rehoming, steps)

    def makes_room(self, key: Key, captured: Captured, refusal: BudgetError) -> bool:
        """Called when a further program is refused. States may move here, between two steps of the optimizer. Returns
        whether the program is there now."""
        has_moved = self.making_room.call(key, captured, refusal)
        if has_moved:
            self.warm_up.end()
        return has_moved

    def before(self, compiled: Compiled) -> None:
        """Called before a program runs. States may move here, between two steps of the optimizer."""
        if not compiled.trains:
            self.warm_up.spoil()
            return
        key, setup = self.rehoming.key_of(compiled), self.session.demanded()
        if self._measured != (setup.machine, setup.trained):  # an optimizer of its own, or more is trained
            self.warm_up.end()
            self._measured, self.warm_up = (setup.machine, setup.trained), self._warm_up()
        begins = setup.machine.store.is_between_steps
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
