"""Errors a user may meet: each says what happened, what was expected and how to go on."""

from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike
from typing import Any

_SHOWN_CHARACTERS = 80


class GeminiError(RuntimeError):
    """Base of every error raised on purpose; its message is ready to be shown to a user."""


class ArgumentError(GeminiError, ValueError):
    """An argument makes no sense: names it, what was given and what was expected."""


class CaptureError(GeminiError):
    """The model cannot be captured as one graph; names the module and the source line."""


class VerificationError(GeminiError):
    """A program is malformed: names the pass, the node, what was found and what was expected."""


class BudgetError(GeminiError):
    """The plan does not fit a memory budget.

    Attributes:
        smallest_bytes: the smallest budget that would do, or None where none is known.
        tier: "host" where that is too small for a plan, or was found full, "device" where the device was found full,
            "" where a plan does not fit it.
    """

    def __init__(self, message: str, smallest_bytes: int | None = None, tier: str = "") -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes
        self.tier = tier


class IllegalTransition(GeminiError):  # noqa: N818  # the state machine's own term
    """A chunk or a model was asked to move between two states that its state machine does not connect."""


class StateError(GeminiError):
    """A call came at a moment when it cannot be honoured, such as a second backward."""


class CheckpointError(GeminiError):
    """A checkpoint cannot be written or read; whatever was saved before is still there."""


class ShardingError(GeminiError, ValueError):
    """A model cannot be sharded as `parallel=` declares."""


class SplitError(ArgumentError):
    """A batch cannot be run as microbatches: names what stands in the way."""


REFUSALS = (BudgetError, ShardingError, SplitError)
"""What a whole program may tell that its blocks do not: it does not fit, or cannot be divided so."""


def as_cause(error: BaseException) -> BaseException:
    """Return an error that a context manager was given, for another one to be raised from.

    Its traceback begins in the context manager's own frame, whose caller holds the error: since Python 3.12 they hold
    each other, with all the tensors of the frames below, until garbage is collected. That frame is taken off.
    """
    traceback = error.__traceback__
    return error.with_traceback(traceback.tb_next if traceback else None)


def did_you_mean(name: object, names: Iterable[str], otherwise: str = "") -> str:
    """A question after the nearest of some names, where what was given is near to one, or what is said `otherwise`."""
    near = get_close_matches(name, names, 1) if isinstance(name, str) else []
    return f"did you mean {near[0]!r}?" if near else otherwise


def wrong_argument(name: str, value: Any, expected: str, hint: str = "") -> ArgumentError:
    """The error of an argument that was given `value`, of which the beginning is shown."""
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
    return ArgumentError(f"{name}={shown}; expected {expected}{hint and f'; {hint}'}")


def check_path(name: str, value: Any, expected: str) -> None:
    """Raises ArgumentError where an argument is no path. An empty one would be the directory that one happens to be
    in."""
    if not isinstance(value, str | PathLike) or str(value) == "" or "\0" in str(value):
        raise wrong_argument(name, value, expected)
