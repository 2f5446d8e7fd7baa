"""State machines: tables of which states may follow on each."""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from .errors import IllegalTransition

S = TypeVar("S", bound=Enum)


def transition(legal: Mapping[S, frozenset[S]], what: str, now: S, then: S, hint: str = "") -> S:
    """The state `then` of `what` is in `now`. Raises IllegalTransition where the table has no such edge."""
    if then not in legal[now]:
        expected = ", ".join(sorted(state.name for state in legal[now])) or "no other"
        raise IllegalTransition(f"{what} cannot go from {now.name} to {then.name}; expected {expected}{hint}")
    return then
