"""Which numbers among the arguments of calls are inputs of programs: those that come with other values, if they can."""

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
    """Of calls that differ in numbers alone one that was captured: its step, and its numbers by their positions, which
    are `inputs` of other steps by now, or `constants` for good."""

    step: Captured
    values: Mapping[int, float]
    inputs: frozenset[int] = frozenset()
    constants: frozenset[int] = frozenset()

    @classmethod
    def of(cls, call: Call, capture: Capture, before: "_Met | None") -> "_Met":
        """Of a call that was not captured yet."""
        if before is not None and not before.changed(call) and before.is_of_today():
            return before
        known = () if before is None else (before.inputs, before.constants)
        return cls(capture(call), call.numbers, *known)

    def changed(self, call: Call) -> frozenset[int]:
        return frozenset(i for i, value in call.numbers.items() if repr(value) != repr(self.values[i]))

    def tells_of(self, call: Call) -> bool:
        """Whether a call has the same constants, and the model its state."""
        return self.constants.isdisjoint(self.changed(call)) and self.is_of_today()

    def is_of_today(self) -> bool:
        return all(guard.holds() for guard in self.step.guards)

    def is_case_of(self, step: Captured, inputs: frozenset[int]) -> bool:
        """Whether a step with these inputs is this one where they have its values, and its loss no larger."""
        mine, its = ((c.result_spec, c.result_leaves, c.differentiable, c.detached) for c in (self.step, step))
        values = {f"number:{i}": self.values[i] for i in inputs}
        if mine != its or not is_same_step(step.program, self.step.program, values):
            return False
        return logits_bytes(step.program) == logits_bytes(self.step.program)


class ChangingNumbers:
    """A number is a constant of a program until it changes. Then it is tried as an input, and is one where the program
    that has it as an input is, with the earlier value, the program of that value. Where they `may_be_inputs` at all."""

    def __init__(self, may_be_inputs: bool = True) -> None:
        self.may_be_inputs = may_be_inputs
        self._met: Recent[_Met] = Recent()

    def taken(self, call: Call) -> Call:
        """The call, with those numbers as inputs that are by now."""
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
    """Of numbers that cannot all be inputs those that can, and the step that has them so."""
    inputs, step = frozenset[int](), met.step
    for i in sorted(wanted) if len(wanted) > 1 else ():
        more = _attempted(call.taking(inputs | {i}), met, capture)
        if more is not None:
            inputs, step = inputs | {i}, more
    return replace(met, inputs=inputs, constants=met.constants | (wanted - inputs)), step


def _attempted(call: Call, met: _Met, capture: Capture) -> Captured | None:
    """The step with numbers as inputs; None where it depends on them by more than computing with them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other capture tells all that there is to tell
        try:
            step = capture(call)
        except Exception:  # a model's Python raises what it likes where a number has no value
            return None
    return step if met.is_case_of(step, call.inputs) else None
