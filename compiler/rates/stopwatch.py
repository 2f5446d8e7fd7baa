"""How long something takes on a device that is busy: under load that lasts, and behind work that hides its launches."""

import statistics
import time
from collections import deque
from collections.abc import Callable

import torch

from ...runtime.memory.streams import Arrival, CopyEngine

Run = Callable[[], object]


WINDOWS, MOST_WINDOWS = 9, 36
"""In so many equal parts what is timed is divided, and in how many where these are unlike."""

NARROW = 0.03
"""The half of the windows in the middle may be apart by this share of their median."""


def seconds_each(run: Run, wait: Run, at_least_s: float, now: Callable[[], float] = time.perf_counter,
                 choose: Callable[[list[float]], float] = statistics.median) -> float:  # fmt: skip
    """Seconds of one run, under load that has lasted a while: bursts double for half of `at_least_s`, and as long again
    windows are timed, more of them where they are unlike. What counts is their median, which a few of them that
    something disturbs do not move, or what else `choose` makes of them."""

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
    """Device seconds of one of `count` runs that are launched while it still has `load` to do. Elsewhere than on CUDA
    nothing is launched ahead."""
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
    """Keeps something busy: work is launched again as soon as the last but one is done."""

    def __init__(self, launch: Callable[[], Arrival], engine: CopyEngine) -> None:
        self.launch = launch
        self.engine = engine
        self.waiting: deque[Arrival] = deque()

    def keep(self) -> None:
        """Call it more often than the work takes."""
        while self.waiting and (self.waiting[0] is None or self.waiting[0].query()):
            self.waiting.popleft()
        while len(self.waiting) < 2:
            self.waiting.append(self.launch())

    def end(self) -> None:
        while self.waiting:
            self.engine.finish(self.waiting.popleft())
