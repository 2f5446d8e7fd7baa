"""Where a step's time goes: device compute, copies, host updates, and waiting."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from ...runtime.isa.errors import check_path, wrong_argument
from ...runtime.memory.state_store import StateStore
from ...runtime.memory.traffic import covered_s


@dataclass(frozen=True)
class Profile:
    """Seconds per step; each field counts the time in which at least one such thing ran.

    `copies_up_s` are copies to the device, `copies_down_s` copies to the host, `host_update_s` the host's optimizer
    updates. On a machine without a GPU `compute_s` is the time in torch's operators and there are no copies.
    """

    step_s: float
    compute_s: float
    copies_up_s: float
    copies_down_s: float
    host_update_s: float

    @property
    def waiting(self) -> float:
        """The share of the step in which the device computes nothing."""
        return max(0.0, 1.0 - self.compute_s / self.step_s)

    def __str__(self) -> str:
        rows = [
            ("step", self.step_s), ("device computes", self.compute_s), ("copies to the device", self.copies_up_s),
            ("copies to the host", self.copies_down_s), ("host updates", self.host_update_s),
        ]  # fmt: skip
        lines = [f"{name:<22}{seconds * 1e3:10.1f} ms {seconds / self.step_s:8.0%}" for name, seconds in rows]
        return "\n".join([*lines, f"{'device waits':<35}{self.waiting:9.0%}"])


def profile(step: Callable[[], object], steps: int, trace: str | Path | None, store: StateStore | None) -> Profile:
    """Runs `step` `steps` times under torch's profiler and finishes all updates; with `trace`, writes a Chrome trace to
    that path. `store` tells the seconds of host updates (None: there are none).

    Raises ArgumentError where `step` is not callable, `steps` is not positive, or the trace cannot be written.
    """
    if not callable(step):
        raise wrong_argument("step", step, "a function that runs one step of the training loop")
    if type(steps) is not int or steps < 1:
        raise wrong_argument("steps", steps, "the number of steps to profile, 1 or more")
    if trace is not None:
        _check_trace(trace)
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    _finish(store)
    before_s = store.host_update_s if store is not None else 0.0
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _finish(store)
        step_s = time.perf_counter() - start
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in profiler.events() or () if event.device_type == wanted]
    copies = {kind: [e for e in events if f"Memcpy {kind}" in e.name] for kind in ("HtoD", "DtoH")}
    computes = [e for e in events if not e.name.startswith(("Memcpy HtoD", "Memcpy DtoH")) and not _is_mark(e)]
    update_s = store.host_update_s - before_s if store is not None else 0.0
    seconds = (step_s, *map(_covered_s, (computes, copies["HtoD"], copies["DtoH"])), update_s)
    return Profile(*(value / steps for value in seconds))


def _check_trace(trace: str | Path) -> None:
    """Raises ArgumentError for a path that cannot be written: torch itself only prints to stderr."""
    check_path("trace", trace, "a file for the trace")
    parent = Path(trace).absolute().parent
    if Path(trace).is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise wrong_argument("trace", str(trace), "a file in a writable directory")


def _finish(store: StateStore | None) -> None:
    if store is not None:
        store.finish()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _is_mark(event: Any) -> bool:
    """Whether an event is an annotation that covers others, rather than work of its own."""
    return event.name.startswith(("ProfilerStep", "Optimizer.", "## "))


def _covered_s(events: Iterable[Any]) -> float:
    """Seconds in which at least one of the events was running."""
    return covered_s((event.time_range.start * 1e-6, event.time_range.end * 1e-6) for event in events)
