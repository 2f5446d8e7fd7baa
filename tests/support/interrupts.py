"""Failures at any place of a program's way: in the n-th line of some files, or the n-th call of some functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any


class Failure:
    """Counts what passes by while it is armed, and raises an error of class `error` when number `at` does."""

    def __init__(self) -> None:
        self.count = 0
        self.at: int | None = None
        self.error: type[BaseException] = KeyboardInterrupt
        self.is_armed = False

    @contextmanager
    def armed(self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
        """While this is open; without a number it only counts."""
        self.count, self.at, self.error, self.is_armed = 0, at, error, True
        try:
            yield
        finally:
            self.is_armed = False

    def pass_by(self) -> None:
        if not self.is_armed:
            return
        self.count += 1
        if self.count - 1 == self.at:
            raise self.error("on purpose")

    def in_front_of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls pass by before anything is done."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.pass_by()
            return function(*args, **kwargs)

        return call

    def behind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls pass by when all is done."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            self.pass_by()
            return found

        return call


@contextmanager
def in_lines(files: Collection[str], pass_by: Callable[[], None]) -> Iterator[None]:
    """While this is open, every line that this thread runs of these files calls `pass_by` first."""

    def traced(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            pass_by()
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        yield
    finally:
        sys.settrace(before)
