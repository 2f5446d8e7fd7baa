"""How long something takes where it runs: moments on a device's stream or on the host's clock, and copies between two.

A moment of a device is an event: taking one costs a launch and waits for nothing, and only whoever asks how far two of
them are apart waits for them.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import TypeAlias

import torch

Moment: TypeAlias = torch.cuda.Event | float
"""When the current stream has come so far, or seconds on the host's clock."""


def moment(on_cuda: bool) -> Moment:
    """Now: behind all that was launched on the current stream, or at once."""
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin: Moment, end: Moment) -> float:
    """From one moment to another of the same kind. Blocks until both have come."""
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        begin.synchronize()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - begin


class Direction(Enum):
    """Of copies."""

    UP = "to the device"
    DOWN = "to the host"


class Traffic:
    """When copies ran, each way, for as long as somebody wants to know."""

    def __init__(self) -> None:
        self.is_watched = False
        self._copies: list[tuple[Direction, Moment, Moment]] = []  # several threads append

    def copying(self, direction: Direction, on_cuda: bool) -> AbstractContextManager[None]:
        """Around a copy, on the stream that it runs on."""
        return self._noted(direction, on_cuda) if self.is_watched else nullcontext()

    @contextmanager
    def _noted(self, direction: Direction, on_cuda: bool) -> Iterator[None]:
        begin = moment(on_cuda)
        yield
        self._copies.append((direction, begin, moment(on_cuda)))

    def begin(self) -> None:
        """Watch from here on."""
        self._copies, self.is_watched = [], True

    def end(self) -> dict[Direction, float]:
        """Watch no more. For how many seconds each direction was busy; blocks until all copies are done."""
        copies, self._copies, self.is_watched = self._copies, [], False
        found = dict.fromkeys(Direction, 0.0)
        for direction in Direction:
            spans = [(begin, end) for which, begin, end in copies if which is direction]
            if spans:
                first = spans[0][0]
                found[direction] = covered_s((seconds(first, begin), seconds(first, end)) for begin, end in spans)
        return found


def covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """How long it is together what spans cover, from second to second, which may overlap: several streams may copy the
    same way."""
    covered, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered
