"""Times work on a busy device: under sustained load, and queued behind other work that hides its launches."""

import statistics
import time
from collections import deque
from collections.abc import Callable

import torch

from ...runtime.memory.streams import Arrival, CopyEngine

Run = Callable[[], object]


WINDOWS, MOST_WINDOWS = 9, 36
"""Timed windows, and the most of them if they differ."""

NARROW = 0.03
"""Windows differ if their interquartile range exceeds this share of their median."""


def seconds_each(run: Run, wait: Run, at_least_s: float, now: Callable[[], float] = time.perf_counter,
                 choose: Callable[[list[float]], float] = statistics.median) -> float:  # fmt: skip
    """Seconds of one run under sustained load.

    Bursts of runs, doubling in size, warm up for half of `at_least_s`; then windows are timed for as long again, and
    more of them if they differ. The result is their median, which a few disturbed windows do not move, or whatever
    `choose` picks. `wait` blocks until the runs are done.
    """

    def burst(count: int) -> float:
        start_s = now()
        for _ in range(count):
            run()
        wait()
        return (now() - start_s) / count

    run()
    wait()
    begin_s, count, each_s = now(), 1, burst(1)
    while now() - begin_s < at_least_s / 2:
        count *= 2
        each_s = burst(count)
    windows = min(WINDOWS, int(at_least_s / 2 / each_s)) if each_s else WINDOWS
    if windows < 2:
        return each_s
    size = max(1, int(at_least_s / 2 / windows / each_s)) if each_s else count
    found = [burst(size) for _ in range(windows)]
    while len(found) < MOST_WINDOWS and _is_wide(found):
        found += [burst(size) for _ in range(windows)]
    return choose(found)


def _is_wide(found: list[float]) -> bool:
    low, middle, high = statistics.quantiles(found, n=4)
    return high - low > NARROW * middle


def seconds_behind(load: Run, run: Run, count: int, device: torch.device) -> float:
    """Device seconds of one of `count` runs that are launched while the device is still busy with `load`. Outside of
    CUDA, where nothing is launched ahead, plain timing."""
    run()
    if device.type != "cuda":
        return seconds_each(run, lambda: None, 0.0)
    load()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / count


class Load:
    """Keeps a device busy: two launches of work are always queued."""

    def __init__(self, launch: Callable[[], Arrival], engine: CopyEngine) -> None:
        self.launch = launch
        self.engine = engine
        self.waiting: deque[Arrival] = deque()

    def keep(self) -> None:
        """Refills the queue; call it more often than one launch of work takes."""
        while self.waiting and (self.waiting[0] is None or self.waiting[0].query()):
            self.waiting.popleft()
        while len(self.waiting) < 2:
            self.waiting.append(self.launch())

    def end(self) -> None:
        while self.waiting:
            self.engine.finish(self.waiting.popleft())
