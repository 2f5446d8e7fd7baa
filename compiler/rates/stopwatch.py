"""How long something takes on a device that is busy: under load that lasts, and behind work that hides its launches."""

import time
from collections import deque
from collections.abc import Callable

import torch

from ...runtime.memory.streams import Arrival, CopyEngine

Run = Callable[[], object]


def seconds_each(run: Run, wait: Run, at_least_s: float, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one run: of the last of bursts that double, under load that has lasted `at_least_s` at its end."""
    run()
    wait()
    begin_s = start_s = now()
    count = 1
    while True:
        for _ in range(count):
            run()
        wait()
        end_s = now()
        if end_s - begin_s >= at_least_s:
            return (end_s - start_s) / count
        count, start_s = count * 2, end_s


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
