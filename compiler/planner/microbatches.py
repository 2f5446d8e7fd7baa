"""The number of microbatches and rounds of a batch, where the user does not say: as few as fit, or more if faster."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from ...passes.program.estimate import Alternative
from ...passes.program.plan import Plan
from ...runtime.isa.errors import BudgetError, SplitError
from .simulate import DEVICE, LAUNCHES
from .solution import Solution

Decision = tuple[Solution, Exception | None]
"""A solution, and the error that refuses steps until the model's own optimizer is made (None: steps may run)."""

GAIN = 0.03
"""Doubling the microbatches is worth it where the modelled step, or the smallest budget, shrinks by this share."""


AGAIN_SHARE = 0.25
"""About the share of a block's time that recomputing it takes: its forward once more."""

MOST_ROUNDS_WEIGHED = 2
"""At most this many numbers of rounds are planned for, since each takes at least as long to plan for as one round."""


def fewest(find: Callable[[int], Decision], examples: int, device_bytes: int | None = None) -> Decision:
    """The decision for the whole batch where that fits; otherwise for 2, 4, 8, ... parts of it, as long as more parts
    need less memory. Raises BudgetError where nothing fits.

    `device_bytes` is the device's budget. A number of parts is skipped if even a perfect division of the whole batch's
    need leaves more than the budget to each, as long as a larger number could still fit.
    """
    refused: list[BudgetError] = []
    counts = list(_counts(examples))
    for count in counts:
        if refused and _are_too_few(count, refused[0], counts[-1], device_bytes):
            continue
        try:
            return _faster(find, count, find(count), examples)
        except BudgetError as refusal:
            if refusal.tier == "host":  # which fewer activations at a time do not relieve
                raise
            refused.append(refusal.with_traceback(None))  # whose frames hold this list, and what the caller holds
            # Parts need gradient sums that the whole batch does not, so activations alone decide only from the second
            # split on.
            if len(refused) > 2 and not _is_less(refusal.smallest_bytes, refused[-2].smallest_bytes):
                break
        except SplitError as error:
            refused[0].args = (f"{refused[0]}. The batch is not run as microbatches: {error}",)
            break
    raise min(refused, key=lambda refusal: refusal.smallest_bytes or 0)


def _are_too_few(count: int, whole: BudgetError, most: int, device_bytes: int | None) -> bool:
    """Whether this many parts cannot fit, but more of them may, by what the whole batch needs."""
    if device_bytes is None or whole.smallest_bytes is None:
        return False
    return whole.smallest_bytes / count > device_bytes >= whole.smallest_bytes / most


def in_rounds(find: Callable[[int], Decision], best: Decision, copied_s: float) -> Decision:
    """The best decision for one round, or for more where that is faster: only one round's activations are held at a
    time, so that less is recomputed. `copied_s` is how long each further round keeps the bus busy each way."""
    plan = best[0].plan
    # Among equally good ones the largest number comes first, since it leaves the most room.
    bounds = [(_least_s(plan, rounds, copied_s), -rounds) for rounds in _counts(plan.microbatches) if rounds > 1]
    for least_s, rounds in ((least_s, -negative) for least_s, negative in sorted(bounds)[:MOST_ROUNDS_WEIGHED]):
        if not _is_less(least_s, best[0].plan.estimate.step_s):
            break
        try:
            other = find(rounds)
        except BudgetError:
            continue
        except SplitError:
            break
        if not _is_less(other[0].plan.estimate.step_s, best[0].plan.estimate.step_s):
            best = _beside(other, best)
            break
        best = _beside(best, other)
    return best


def _least_s(plan: Plan, rounds: int, copied_s: float) -> float:
    """A lower bound for a step in `rounds` rounds, from the plan for one: as if no block were recomputed and only the
    gradient sums were copied."""
    again = AGAIN_SHARE * len(plan.recompute) / max(1, len(plan.blocks))
    computed = (seconds for name, seconds in plan.estimate.busy_s if name in (DEVICE, LAUNCHES))
    return max((1 - again) * max(computed, default=0.0), (rounds - 1) * copied_s)


def _is_less(after: float | None, before: float | None) -> bool:
    """Whether a value has shrunk by enough to go on."""
    return after is not None and before is not None and after < (1 - GAIN) * before


def _counts(examples: int) -> Iterator[int]:
    """1, 2, 4, ... as long as they divide the examples."""
    yield 1
    count = 2
    while examples and examples % count == 0:
        yield count
        count *= 2


def _faster(find: Callable[[int], Decision], count: int, decision: Decision, examples: int) -> Decision:
    """The decision, or the one for twice as many microbatches if that is faster."""
    if count == 1 or examples % (2 * count):
        return decision
    try:
        other = find(2 * count)
    except (BudgetError, SplitError):
        return decision
    step_s, other_s = (solution.plan.estimate.step_s for solution, _ in (decision, other))
    return _beside(decision, other) if _is_less(other_s, step_s) else _beside(other, decision)


def _beside(instead: Decision, decision: Decision) -> Decision:
    """`decision`, with the one that was not taken, `instead`, among its alternatives."""
    solution, refusal = decision
    other, plan = instead[0].plan, solution.plan
    what = (
        f"{other.microbatches} microbatches" if other.microbatches != plan.microbatches else f"{other.rounds} round(s)"
    )
    told = Alternative(what, other.estimate.step_s, other.peak_bytes)
    alternatives = sorted((*plan.alternatives, told), key=lambda one: one.step_s)
    return replace(solution, plan=replace(plan, alternatives=tuple(alternatives))), refusal
