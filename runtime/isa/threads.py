"""Patches of torch's functions that hold during a capture, in the capturing thread alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

CAPTURING = RLock()
"""Held by the thread that captures: a function is patched by one thread at a time, which restores what it found."""


def in_this_thread(function: Callable[..., Any], in_others: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `function` in the thread that made it, and `in_others` in all other threads."""
    here = get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if get_ident() == here else in_others)(*args, **kwargs)

    return call


@contextmanager
def patched(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within, the module's function of that name is `function` to this thread."""
    original = getattr(module, name)
    setattr(module, name, in_this_thread(function, original))
    try:
        yield
    finally:
        setattr(module, name, original)
