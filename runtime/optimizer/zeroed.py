"""Tracks which parameters have a gradient, and which were set to zero: torch's optimizers update by a zero, too."""

from collections.abc import Callable, Iterable

from ..isa.errors import StateError

Place = tuple[int, int]
"""A parameter, by chunk index and slot."""


class ZeroedGradients:
    """Gradients set by zero_grad(set_to_none=False). A step frees gradients, so there is no memory to hold zeros.

    If every zeroed gradient is computed anew before the next step, as in most loops, that makes no difference; else the
    step is refused.
    """

    def __init__(self) -> None:
        self._brought: set[Place] = set()  # computed since the last step
        self._before: set[Place] = set()  # computed in earlier steps, and not dropped
        self._zeroed: set[Place] = set()

    def brought(self, index: int, slots: Iterable[int]) -> None:
        self._brought.update((index, slot) for slot in slots)

    def has(self, index: int, slot: int) -> bool:
        """Whether a parameter has a gradient from the user's point of view."""
        return (index, slot) in self._brought or (index, slot) in self._before

    def forget(self, index: int, slot: int) -> None:
        """Records that one parameter's gradient is None from now on."""
        for places in (self._brought, self._before, self._zeroed):
            places.discard((index, slot))

    def drop(self) -> None:
        """Records zero_grad(set_to_none=True)."""
        self._brought.clear()
        self._before.clear()
        self._zeroed.clear()

    def zero(self) -> None:
        """Records zero_grad(set_to_none=False)."""
        self._zeroed |= self._brought | self._before
        self._brought.clear()

    def step(self, name: Callable[[Place], str]) -> None:
        """Ends a step. Raises StateError if a gradient that was set to zero has not been computed anew."""
        lacking = self._zeroed - self._brought
        if lacking:
            raise StateError(
                f"zero_grad(set_to_none=False) set the gradient of {name(min(lacking))} to zero, and no backward has "
                "computed a new one: torch's optimizers would still update that parameter (by weight decay or "
                "momentum), but model.optimizer(...) does not keep zero gradients. Call zero_grad() instead, after "
                "which such parameters are not updated"
            )
        self._before |= self._brought
        self._brought.clear()
