"""The errors that ranks raise when one of them fails."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..isa.errors import REFUSALS, GeminiError, StateError


@dataclass(frozen=True)
class Failure:
    """A rank's error as reported to the others: the type of error that they raise, its text, and its attributes."""

    kind: type[GeminiError]
    text: str
    attributes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Exception | None) -> "Failure | None":
        """Describes an error, if there is one: others raise a refusal as its type in `REFUSALS`, any other error as a
        StateError."""
        if error is None:
            return None
        text = f"{type(error).__name__}: {error}"
        kind = next((kind for kind in REFUSALS if isinstance(error, kind)), None)
        return cls(StateError, text) if kind is None else cls(kind, text, vars(error))

    def error(self, text: str) -> GeminiError:
        """The same error with another text."""
        made = self.kind(text)
        vars(made).update(self.attributes)
        return made


def raise_any(own: Exception | None, told: Mapping[int, Failure | None]) -> None:
    """Raises if any rank has failed: this rank's `own` error, or one that reports the errors of others, by rank in
    `told`."""
    if own is not None:
        raise own
    failed = {rank: failure for rank, failure in told.items() if failure is not None}
    for first in failed.values():
        raise first.error("; ".join(f"rank {rank} failed with {each.text}" for rank, each in failed.items()))
