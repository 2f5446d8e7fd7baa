"""How many microbatches a batch is run as where the user does not say: as few as fit, or more where that is faster."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from ...passes.program.estimate import Alternative
from ...runtime.isa.errors import BudgetError, SplitError
from .refusal import HostBudgetError
from .search import Solution

Decision = tuple[Solution, Exception | None]
"""What is decided, and why steps are refused until the model's own optimizer is made, where they are."""

GAIN = 0.03
"""Twice as many microbatches are worth it where the modelled step, or the least memory, is less by this share."""


def fewest(find: Callable[[int], Decision], examples: int) -> Decision:
    """The decision for the whole batch where that fits; else for 2, 4, 8, ... parts of it, as long as more of them need
    less. Raises BudgetError where nothing fits."""
    refused: list[BudgetError] = []
    for count in _counts(examples):
        try:
            return _faster(find, count, find(count), examples)
        except HostBudgetError:
            raise
        except BudgetError as refusal:
            refused.append(refusal)
            # Two need sums of gradients that one does not: only from there on activations alone decide.
            if count > 2 and not _is_less(refusal.smallest_bytes, refused[-2].smallest_bytes):
                break
        except SplitError as error:
            refused[0].args = (f"{refused[0]}. The batch is not run as microbatches: {error}",)
            break
    raise min(refused, key=lambda refusal: refusal.smallest_bytes or 0)


def _is_less(after: float | None, before: float | None) -> bool:
    """Whether something has become less by enough to go on with."""
    return after is not None and before is not None and after < (1 - GAIN) * before


def _counts(examples: int) -> Iterator[int]:
    """1, 2, 4, ... as long as the examples divide by it."""
    yield 1
    count = 2
    while examples and examples % count == 0:
        yield count
        count *= 2


def _faster(find: Callable[[int], Decision], count: int, decision: Decision, examples: int) -> Decision:
    """A decision, or that for twice as many microbatches."""
    if count == 1 or examples % (2 * count):
        return decision
    try:
        other = find(2 * count)
    except (BudgetError, SplitError):
        return decision
    step_s, other_s = (solution.plan.estimate.step_s for solution, _ in (decision, other))
    return _beside(decision, other) if _is_less(other_s, step_s) else _beside(other, decision)


def _beside(instead: Decision, decision: Decision) -> Decision:
    """A decision that tells of the one that was not taken."""
    solution, refusal = decision
    other, plan = instead[0].plan, solution.plan
    told = Alternative(f"{other.microbatches} microbatches", other.estimate.step_s, other.peak_bytes)
    alternatives = sorted((*plan.alternatives, told), key=lambda one: one.step_s)
    return replace(solution, plan=replace(plan, alternatives=tuple(alternatives))), refusal
