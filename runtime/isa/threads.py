"""What is put in the place of torch's functions while a model is captured is for the thread that captures it."""

from collections.abc import Callable
from threading import RLock, get_ident
from typing import Any

CAPTURING = RLock()
"""Held by the thread that captures: there is one place for each function, and each thread puts back what it found."""


def in_this_thread(function: Callable[..., Any], in_others: Callable[..., Any]) -> Callable[..., Any]:
    """`function` where the thread calls it that called this, and `in_others` in all others."""
    here = get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if get_ident() == here else in_others)(*args, **kwargs)

    return call
