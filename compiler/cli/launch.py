"""Starts the command once more in several processes on this machine, as torchrun would, and waits for them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
from types import FrameType
from typing import Any

from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.utils.distributed import get_free_port

GRACE_S = 5.0
"""Seconds that an error of another rank than 0 waits: where rank 0 has it too, it tells it, and alone."""


def is_launched() -> bool:
    """Return whether this process is one of several, of ours or of torchrun's."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return which of the processes this is."""
    return int(os.environ["RANK"]) if is_launched() else 0


def launch(words: list[str], nprocs: int) -> int:
    """Run `geminifx` with these words in `nprocs` processes; return the exit code of rank 0, or of one that failed.

    Ctrl-C goes to all of them, which save and end by themselves. Where one fails the others are ended.
    """
    # It names processes that failed by number; what failed they tell themselves.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nprocs)))
    environments = {
        i: address
        | {"RANK": str(i), "LOCAL_RANK": str(i), "OMP_NUM_THREADS": threads}
        | {"WORLD_SIZE": str(nprocs), "LOCAL_WORLD_SIZE": str(nprocs)}
        for i in range(nprocs)
    }
    command = ("-m", "geminifx", *words)
    with tempfile.TemporaryDirectory() as logs:
        processes = start_processes(
            "geminifx", sys.executable, dict.fromkeys(range(nprocs), command), environments, DefaultLogsSpecs(logs)
        )

        def interrupt(number: int, _frame: FrameType | None) -> None:
            for pid in processes.pids().values():
                with contextlib.suppress(ProcessLookupError):  # it may have ended
                    os.kill(pid, number)

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            done = processes.wait(period=0.2)
        finally:
            processes.close()
            signal.signal(signal.SIGINT, previous)
    failures = {} if done is None else done.failures
    first = failures.get(0) or min(failures.values(), key=lambda failure: failure.timestamp, default=None)
    return 0 if first is None else first.exitcode


def leave(panel: Any) -> None:
    """Show an error: rank 0 at once, another rank where rank 0 did not end the run for one of its own."""
    if rank() > 0:
        time.sleep(GRACE_S)
    Console(stderr=True).print(panel)
