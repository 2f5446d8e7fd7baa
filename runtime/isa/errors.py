"""Errors that users may meet: each says what happened, what was expected and how to go on."""

from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike
from typing import Any

_SHOWN_CHARACTERS = 80


class GeminiError(RuntimeError):
    """Base of every error raised on purpose; its message is ready to be shown to a user."""


class ArgumentError(GeminiError, ValueError):
    """An argument is invalid: names it, what was given and what was expected."""


class CaptureError(GeminiError):
    """The model cannot be captured as one graph; names the module and the source line."""


class VerificationError(GeminiError):
    """A program is malformed: names the pass, the node, what was found and what was expected."""


class BudgetError(GeminiError):
    """A plan does not fit a memory budget, or memory ran out.

    Attributes:
        smallest_bytes: the smallest budget that would do; None if unknown.
        tier: the tier that was full, "host" or "device"; also "host" if the host is too small for any plan, and "" if
            the plan does not fit the device.
    """

    def __init__(self, message: str, smallest_bytes: int | None = None, tier: str = "") -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes
        self.tier = tier


class IllegalTransition(GeminiError):  # noqa: N818  # the state machine's own term
    """A chunk or a model was asked for a transition that its state machine does not have."""


class StateError(GeminiError):
    """A call came at a moment when it cannot be served, such as a second backward."""


class CheckpointError(GeminiError):
    """A checkpoint cannot be written or read; anything saved before is still there."""


class ShardingError(GeminiError, ValueError):
    """A model cannot be sharded as `parallel=` asks."""


class SplitError(ArgumentError):
    """A batch cannot be run as microbatches: names what stands in the way."""


REFUSALS = (BudgetError, ShardingError, SplitError)
"""Refusals: a program does not fit, or cannot be divided as asked. `compile` goes on to another setting if there is
one, and ranks report refusals to each other by type."""


def as_cause(error: BaseException) -> BaseException:
    """Returns `error`, caught by a context manager, for another error to be raised from.

    Its traceback begins in the context manager's own frame, whose caller holds the error: since Python 3.12 the two
    reference each other, and keep all tensors of the frames below alive until garbage collection. That frame is
    removed.
    """
    traceback = error.__traceback__
    return error.with_traceback(traceback.tb_next if traceback else None)


def did_you_mean(name: object, names: Iterable[str], otherwise: str = "") -> str:
    """A question that suggests the nearest of `names`, or `otherwise` if none is near."""
    near = get_close_matches(name, names, 1) if isinstance(name, str) else []
    return f"did you mean {near[0]!r}?" if near else otherwise


def wrong_argument(name: str, value: Any, expected: str, hint: str = "") -> ArgumentError:
    """The error for an argument with the wrong `value`, which is shown truncated."""
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
    return ArgumentError(f"{name}={shown}; expected {expected}{hint and f'; {hint}'}")


def check_path(name: str, value: Any, expected: str) -> None:
    """Raises ArgumentError if an argument is not a path. An empty one would mean the current directory."""
    if not isinstance(value, str | PathLike) or str(value) == "" or "\0" in str(value):
        raise wrong_argument(name, value, expected)
