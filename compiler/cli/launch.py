"""Starts the command once more in several processes on this machine, as torchrun would, and waits for them."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import tempfile
from types import FrameType
from typing import NoReturn

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

from ...models.recipe.finetune import STOPS
from ...runtime.distributed.meeting import launched
from ...runtime.optimizer.updates import cores

HERE = "127.0.0.1"
MOST_PROCESSES = 256
"""More are not for one machine."""


def is_launched() -> bool:
    """Return whether this process is one of several, of ours or of torchrun's."""
    return "RANK" in os.environ and launched() > 1


def rank() -> int:
    """Return which of the processes this is."""
    return int(os.environ["RANK"]) if is_launched() else 0


def end(code: int) -> NoReturn:
    """End this process of several at once, when all that runs at exit has run. What Python tears down after that are
    objects of C++ whose threads may still run, and then the process is aborted, which its launcher takes for a failure.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(words: list[str], nprocs: int) -> int:
    """Run `geminifx` with these words in `nprocs` processes; return the exit code of rank 0, or of one that failed.

    Ctrl-C and SIGTERM go to all of them, which save and end by themselves. Where one fails the others are ended.

    Raises:
        ValueError: they are too many for this machine.
    """
    if nprocs > MOST_PROCESSES:
        raise ValueError(
            f"{nprocs:,} processes are too many to start on one machine, at most {MOST_PROCESSES}; choose smaller "
            "degrees of --parallel or --nprocs, or launch them on several machines by torchrun"
        )
    # It names processes that failed by number; what failed they tell themselves.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # The system chooses the port, and it is listened on from then on: no other program can get it.
    store = TCPStore(HERE, 0, nprocs, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": HERE, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(cores()) // nprocs)))
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

        previous = {number: signal.signal(number, interrupt) for number in STOPS}
        try:
            done = processes.wait(period=0.2)
        finally:
            processes.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
    failures = {} if done is None else done.failures
    first = failures.get(0) or min(failures.values(), key=lambda failure: failure.timestamp, default=None)
    return 0 if first is None else first.exitcode
