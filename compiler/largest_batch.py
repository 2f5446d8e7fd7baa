"""Finds the largest batch that fits the budgets, by planning for larger and larger ones; none is allocated."""

import warnings
from bisect import bisect_left
from dataclasses import dataclass, replace

from ..passes.program.plan import Plan
from ..runtime.isa.errors import BudgetError, StateError
from ..runtime.isa.formats import OwnFormat
from .capture.trace import Captured
from .planner.problem import Planning

PARTS = 8
"""Batches are found to within a factor of 1 + 1/PARTS: each size tried is captured and planned, which takes a while."""


@dataclass(frozen=True)
class LargestBatch:
    """The search for the largest batch of a `captured` training step, with the chunks of the `plan` in force.

    Fields:
        format: the training state's, if `model.optimizer(...)` has declared it.
        only_ours: whether the plan in force has no room for a torch optimizer's state; then none is asked for.
        trains: whether training has begun, so that states stay where they are.
    """

    captured: Captured
    planning: Planning
    plan: Plan
    format: OwnFormat | None
    only_ours: bool
    trains: bool

    def find(self) -> int:
        """Raises StateError if no batch could be too large, or if it is not known how to make this one larger."""
        if self.planning.limits.device_bytes is None:
            raise StateError("there is no device budget, so any batch fits; compile with device_budget= to set one")
        if self.captured.divide is None or not self.captured.examples:
            raise StateError(
                "this batch cannot be enlarged: tensors are sharded over processes, or no argument is a tensor with "
                "examples along its first dimension"
            )
        count, unit = self.captured.examples, self.planning.asked or 1
        while self._fits(2 * count):
            count *= 2
        step = max(count // PARTS // unit, 1) * unit
        between = range(count, 2 * count, step)
        return between[bisect_left(between, True, lo=1, key=lambda size: not self._fits(size)) - 1]

    def _fits(self, examples: int) -> bool:
        assert self.captured.divide is not None
        planning = replace(self.planning, _lowered={}, _logits={})  # own caches, for programs that never run
        with warnings.catch_warnings(action="ignore"):  # the batch in use has already warned
            captured = self.captured.divide.resized(examples)
            try:
                _, refusal = planning.decide(captured, self.plan, self.trains, self.format)
            except BudgetError:
                return False
        return refusal is None or self.only_ours
