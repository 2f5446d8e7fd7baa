"""Runs the command again in several processes on this machine, as torchrun would, and waits for them."""

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
"""The most processes to start on one machine."""


def is_launched() -> bool:
    """Return whether this process is one of several, started by us or by torchrun."""
    return "RANK" in os.environ and launched() > 1


def rank() -> int:
    """Return the rank of this process; 0 if it is the only one."""
    return int(os.environ["RANK"]) if is_launched() else 0


def end(code: int) -> NoReturn:
    """End one of several processes as soon as the exit handlers have run. Python's own teardown would go on to destroy
    C++ objects whose threads may still run; the process would then abort, and its launcher take that for a failure."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(words: list[str], nprocs: int) -> int:
    """Run `geminifx WORDS` in `nprocs` processes; return the exit code of rank 0 or, if only others failed, of the
    first.

    Ctrl-C and SIGTERM are passed on to all processes, which save and exit by themselves. If one fails, the others are
    ended.

    Raises:
        ValueError: that is too many processes for one machine.
    """
    if nprocs > MOST_PROCESSES:
        raise ValueError(
            f"{nprocs:,} processes are too many for one machine, where at most {MOST_PROCESSES} can be started; "
            "choose smaller degrees of --parallel or --nprocs, or launch them on several machines with torchrun"
        )
    # torch's log only names failed processes by number; they report their errors themselves.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # The system chooses the port and the store listens on it from now on, so no other program can take it.
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
                with contextlib.suppress(ProcessLookupError):  # it has already exited
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
