"""State machines, as tables of the states that may follow each state."""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from .errors import IllegalTransition

S = TypeVar("S", bound=Enum)


def transition(legal: Mapping[S, frozenset[S]], what: str, now: S, then: S, hint: str = "") -> S:
    """Returns the new state `then`. Raises IllegalTransition if `what` may not go there from `now`."""
    if then not in legal[now]:
        expected = ", ".join(sorted(state.name for state in legal[now])) or "no other"
        raise IllegalTransition(f"{what} cannot go from {now.name} to {then.name}; expected {expected}{hint}")
    return then
