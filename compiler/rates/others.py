"""Detects others who use the machine while it is measured."""

import time

import psutil
import torch

from ...runtime.isa.units import format_bytes
from ...runtime.optimizer.updates import cores

OTHERS_BYTES = 2 * 2**30
"""Device memory outside torch's allocator above which others must be using the GPU; more than our driver context."""

BUSY_PERCENT = 20
"""Utilization, of the GPU or of the host's cores, above which others count as busy."""


def used_by_others(device: torch.device, needed_bytes: int) -> str | None:
    """How others use the GPU, or that less than `needed_bytes` of its memory are free; None if neither is the case."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    theirs = total - free - torch.cuda.memory_reserved(device)
    if theirs > OTHERS_BYTES:
        return f"other processes hold {format_bytes(theirs)} of the GPU's memory"
    if free < needed_bytes:
        return f"{format_bytes(free)} of the GPU's memory are free, but {format_bytes(needed_bytes)} are needed"
    try:
        busy = torch.cuda.utilization(device) if needed_bytes else 0  # 0 after measuring: that load is ours
    except Exception:  # NVML is missing or forbidden, each of which raises another error
        return None
    return f"the GPU is {busy} % busy already" if busy > BUSY_PERCENT else None


class HostWatch:
    """Measures, from its construction on, how much of the host's CPU time others take."""

    def __init__(self) -> None:
        self.began_s, self.all_s, self.own_s = time.perf_counter(), _all_busy_s(), _own_busy_s()

    def others(self, processes: int = 1) -> str | None:
        """Says so if others keep the host busy, else None. Each of our `processes` is taken to be as busy."""
        count, passed_s = len(cores()), time.perf_counter() - self.began_s
        theirs_s = _all_busy_s() - self.all_s - processes * (_own_busy_s() - self.own_s)
        percent = 100 * theirs_s / (count * passed_s)
        if percent <= BUSY_PERCENT:
            return None
        return f"other processes keep {percent:.0f} % of the host's {count} cores busy"


def _all_busy_s() -> float:
    """Busy seconds of these cores since boot."""
    idle = lambda times: times.idle + getattr(times, "iowait", 0.0)  # noqa: E731
    found = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in cores()]
    counted_twice = lambda times: getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # noqa: E731
    return sum(sum(times) - idle(times) - counted_twice(times) for times in found)


def _own_busy_s() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system
