"""One measurement, in the process that is there for it: seconds of steps, losses and bytes."""

import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch
from geminifx.compiler.cli.launch import rank
from systems import SYSTEMS, Contestant
from systems.base import synchronize
from systems.ours import Ours
from task import Task

WARM_UP = 3
MARK = "RESULT "


def work(system: str, task: Task, steps: int, profile: Path | None, plan_only: bool) -> None:
    """Measure, or plan, print what comes of it as lines of results, and end the process.

    `steps` are all that are run, `profile` is a file for the trace of one more.
    """
    told: dict[str, Any] = {"budget": task.budget}
    try:
        if task.device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            told["gpu"] = torch.cuda.get_device_name()
        tell(told)  # at once: a process that the system ends tells nothing more
        torch.manual_seed(0)  # of dropout
        if plan_only:
            kind = SYSTEMS[system]
            assert issubclass(kind, Ours)
            tell({**kind.planned(task), "done": True})
        else:
            _run(system, task, steps, profile)
    except Exception as error:
        traceback.print_exc()
        lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
        tell({"error": lines[0][:500]})
    sys.stderr.flush()
    os._exit(0)  # an orderly end unpins and frees all host memory, which takes longer than the steps


def _run(system: str, task: Task, steps: int, profile: Path | None) -> None:
    free = psutil.virtual_memory().available
    start = time.perf_counter()
    contestant = SYSTEMS[system](task)
    tell({"setup_s": round(time.perf_counter() - start, 1), **contestant.facts})
    tell({**measure(contestant, steps, task.tokens(), free), "done": True})
    if profile:  # only now: one that fails must not cost what was measured
        print(contestant.profile(str(profile)) or f"{system} makes no profile", flush=True)


def tell(result: dict[str, Any]) -> None:
    """Print a part of the result for the process that collects them."""
    if rank() == 0:
        print("\n" + MARK + json.dumps(result), flush=True)


def measure(contestant: Contestant, steps: int, tokens: int, free_bytes: int) -> dict[str, Any]:
    """Run steps of so many tokens and return seconds, losses and bytes; `free_bytes` of the host were so before."""
    seconds: list[float] = []
    losses: list[float] = []
    usage: dict[str, int] = {}
    synchronize()
    before = time.perf_counter()
    for i in range(steps):
        loss = contestant.step()
        synchronize()
        # From end to end, for what a system still does on the host after its step to count.
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
        losses.append(loss.item())
        usage = {name: max(value, usage.get(name, 0)) for name, value in bytes_in_use(free_bytes).items()}
        if rank() == 0:
            print(f"step {i}: {seconds[-1]:.3f} s, loss {losses[-1]:.4f}", flush=True)
    counted = seconds[min(WARM_UP, steps // 2) :]
    median = statistics.median(counted)
    rate = tokens / median
    return {
        "step_s": round(median, 4), "steps": steps, "steps_counted": len(counted), "tokens": tokens,
        "tokens_per_s": round(rate) if rate >= 100 else round(rate, 2), "all_steps_s": [round(s, 4) for s in seconds],
        "losses": [round(loss, 4) for loss in losses], **usage, **contestant.final_facts(),
    }  # fmt: skip


def bytes_in_use(free_bytes: int) -> dict[str, int]:
    """Return host bytes now, and device bytes: the driver's count now, the allocator's peak since it was reset,
    and at that peak what the driver would have counted."""
    usage = {"host_rss_bytes": psutil.Process().memory_info().rss,
             "host_used_bytes": max(0, free_bytes - psutil.virtual_memory().available)}  # fmt: skip
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_reserved()
        usage |= {"driver_bytes": total - free, "reserved_peak_bytes": peak,
                  "device_peak_bytes": total - free - torch.cuda.memory_reserved() + peak}  # fmt: skip
    return usage
