"""The largest batch that fits the budgets, found by planning for larger and larger ones; none of them is allocated."""

import warnings
from bisect import bisect_left
from dataclasses import dataclass, replace

from ..passes.program.plan import Plan
from ..runtime.isa.errors import BudgetError, StateError
from ..runtime.isa.formats import OwnFormat
from .capture.trace import Captured
from .planner.problem import Planning

PARTS = 8
"""A batch is found to within one part in so many: each size is captured and planned for, which takes a while."""


@dataclass(frozen=True)
class LargestBatch:
    """For the calls that a `captured` training step is of, with the chunks of the `plan` in force. `only_ours` where
    that has no room for a torch optimizer, and `format` is the training state's, where it was declared. Where it
    `trains` already, states stay where they are."""

    captured: Captured
    planning: Planning
    plan: Plan
    format: OwnFormat | None
    only_ours: bool
    trains: bool

    def find(self) -> int:
        """Raises StateError where no batch could be too large, or none is known to be larger."""
        if self.planning.limits.device_bytes is None:
            raise StateError("any batch fits, for there is no device budget; compile with device_budget= to set one")
        if self.captured.divide is None or not self.captured.examples:
            raise StateError(
                "it is not known how to make this batch larger: tensors are sharded over processes, or no argument is "
                "a tensor with examples along its first dimension"
            )
        count, unit = self.captured.examples, self.planning.asked or 1
        while self._fits(2 * count):
            count *= 2
        step = max(count // PARTS // unit, 1) * unit
        between = range(count, 2 * count, step)
        return between[bisect_left(between, True, lo=1, key=lambda size: not self._fits(size)) - 1]

    def _fits(self, examples: int) -> bool:
        assert self.captured.divide is not None
        planning = replace(self.planning, _lowered={}, _logits={})  # of programs that nobody will run
        with warnings.catch_warnings(action="ignore"):  # what is to be told was told of the batch that there is
            captured = self.captured.divide.resized(examples)
            try:
                _, refusal = planning.decide(captured, self.plan, self.trains, self.format)
            except BudgetError:
                return False
        return refusal is None or self.only_ours
