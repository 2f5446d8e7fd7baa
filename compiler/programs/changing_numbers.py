"""Decides which numbers among a call's arguments become inputs of programs: those that change, if possible."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..capture.numbers import is_same_step
from ..capture.results import logits_bytes
from ..capture.trace import Captured
from .programs import Call, Recent

Capture = Callable[[Call], Captured]


@dataclass(frozen=True)
class _Met:
    """The captured call that others are compared with, out of calls that differ only in numbers.

    Fields:
        step: its captured step.
        values: its numbers, by their positions among the call's leaves.
        inputs: positions of numbers that are inputs of other steps by now.
        constants: positions of numbers that cannot be inputs, for good.
    """

    step: Captured
    values: Mapping[int, float]
    inputs: frozenset[int] = frozenset()
    constants: frozenset[int] = frozenset()

    @classmethod
    def of(cls, call: Call, capture: Capture, before: "_Met | None") -> "_Met":
        """The record to compare a call with: `before` if it still applies, otherwise a new capture of this call."""
        if before is not None and not before.changed(call) and before.is_of_today():
            return before
        known = () if before is None else (before.inputs, before.constants)
        return cls(capture(call), call.numbers, *known)

    def changed(self, call: Call) -> frozenset[int]:
        return frozenset(i for i, value in call.numbers.items() if repr(value) != repr(self.values[i]))

    def tells_of(self, call: Call) -> bool:
        """Whether a call has the same constants, and the model has not changed."""
        return self.constants.isdisjoint(self.changed(call)) and self.is_of_today()

    def is_of_today(self) -> bool:
        return all(guard.holds() for guard in self.step.guards)

    def is_case_of(self, step: Captured, inputs: frozenset[int]) -> bool:
        """Whether a step with these inputs becomes this one if they have its values, and its loss takes no more
        memory."""
        mine, its = ((c.result_spec, c.result_leaves, c.differentiable, c.detached) for c in (self.step, step))
        values = {f"number:{i}": self.values[i] for i in inputs}
        if mine != its or not is_same_step(step.program, self.step.program, values):
            return False
        return logits_bytes(step.program) == logits_bytes(self.step.program)


class ChangingNumbers:
    """Keeps numbers constant until they change, and then makes them inputs, if the results stay the same.

    A number that comes with a new value is tried as an input. It becomes one if the program with that input, given the
    earlier value, equals the program captured with that value as a constant. If not `may_be_inputs`, all stay
    constants.
    """

    def __init__(self, may_be_inputs: bool = True) -> None:
        self.may_be_inputs = may_be_inputs
        self._met: Recent[_Met] = Recent()

    def taken(self, call: Call) -> Call:
        """The call, with each number as an input that has become one in earlier calls."""
        met = self._met.get(call.kind) if call.numbers else None
        return call if met is None else call.taking(met.inputs)

    def captured(self, call: Call, capture: Capture) -> tuple[Call, Captured]:
        """The captured step for a call, and the call as that step takes it."""
        if not call.numbers or not self.may_be_inputs:
            return call, capture(call)
        met = self._met.get(call.kind)
        plain = call.taking(frozenset())
        if met is None or not met.tells_of(call):
            met = _Met.of(plain, capture, met)
        wanted = met.inputs | met.changed(call)
        step = _attempted(call.taking(wanted), met, capture) if wanted else None
        if step is None:
            met, step = _one_by_one(wanted, _Met.of(plain, capture, met), call, capture)
        else:
            met = replace(met, inputs=wanted)
        self._met[call.kind] = met
        return call.taking(met.inputs), step


def _one_by_one(wanted: frozenset[int], met: _Met, call: Call, capture: Capture) -> tuple[_Met, Captured]:
    """Tries one by one the numbers that cannot all be inputs at once. Returns the new record, and the step to use."""
    inputs, step = frozenset[int](), met.step
    for i in sorted(wanted) if len(wanted) > 1 else ():
        more = _attempted(call.taking(inputs | {i}), met, capture)
        if more is not None:
            inputs, step = inputs | {i}, more
    return replace(met, inputs=inputs, constants=met.constants | (wanted - inputs)), step


def _attempted(call: Call, met: _Met, capture: Capture) -> Captured | None:
    """The step with numbers as inputs; None if it depends on them in other ways than by computing with them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the capture with constants has already warned
        try:
            step = capture(call)
        except Exception:  # the model's Python may raise anything when a number has no value
            return None
    return step if met.is_case_of(step, call.inputs) else None
