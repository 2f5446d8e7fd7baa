"""Timing of work where it runs: on a device's stream or on the host's clock, and of copies between the two.

A moment on a device is an event. Recording one costs a launch and waits for nothing; only `seconds`, which measures the
distance between two, waits for them.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import TypeAlias

import torch

Moment: TypeAlias = torch.cuda.Event | float
"""A point on a CUDA stream, or seconds on the host's clock."""


def moment(on_cuda: bool) -> Moment:
    """Now: on CUDA, after everything launched so far on the current stream; else the host's time."""
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin: Moment, end: Moment) -> float:
    """The seconds from one moment to another of the same kind. Blocks until both have come."""
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        begin.synchronize()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - begin


class Direction(Enum):
    """The direction of copies."""

    UP = "to the device"
    DOWN = "to the host"


class Traffic:
    """Records when copies run, in each direction, while it is watched."""

    def __init__(self) -> None:
        self.is_watched = False
        self._copies: list[tuple[Direction, Moment, Moment]] = []  # several threads append

    def copying(self, direction: Direction, on_cuda: bool) -> AbstractContextManager[None]:
        """A context for launching a copy on the current stream; records the copy while watched."""
        return self._noted(direction, on_cuda) if self.is_watched else nullcontext()

    @contextmanager
    def _noted(self, direction: Direction, on_cuda: bool) -> Iterator[None]:
        begin = moment(on_cuda)
        yield
        self._copies.append((direction, begin, moment(on_cuda)))

    def begin(self) -> None:
        """Starts watching."""
        self._copies, self.is_watched = [], True

    def end(self) -> dict[Direction, float]:
        """Stops watching. Returns the seconds that each direction was busy; blocks until all copies are done."""
        copies, self._copies, self.is_watched = self._copies, [], False
        found = dict.fromkeys(Direction, 0.0)
        for direction in Direction:
            spans = [(begin, end) for which, begin, end in copies if which is direction]
            if spans:
                first = spans[0][0]
                found[direction] = covered_s((seconds(first, begin), seconds(first, end)) for begin, end in spans)
        return found


def covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """The total length, in seconds, of the union of spans (begin, end). They overlap if several streams copy the same
    way."""
    covered, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered
