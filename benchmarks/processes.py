"""Runs each measurement in a fresh process, or several, and collects what they tell."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from measuring import MARK

LAST_WORDS_S = 5.0


@dataclass
class Output:
    """What a worker has printed: its result, as far as it came, and its last line."""

    result: dict[str, Any] = field(default_factory=dict)
    last: str = ""

    def read(self, lines: Iterable[str]) -> None:
        """Print the lines, indented, as they come."""
        for line in lines:
            if line.startswith(MARK):
                self.result |= json.loads(line.removeprefix(MARK))
            else:
                self.last = line.strip() or self.last
                print("   ", line, end="", flush=True)


def run_worker(words: Sequence[str], nprocs: int, timeout_s: float, expandable: bool) -> dict[str, Any]:
    """Run this script with other words and return the result that it tells; how it failed, if it did, is `error` in it.

    `expandable` lets torch's allocator grow its segments, as all large models need.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nprocs}"]
    command = [sys.executable, *(launch if nprocs > 1 else []), *words]
    environment = dict(os.environ)
    if expandable:
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    said = Output()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", env=environment)  # fmt: skip
    # A thread reads, since the pipe stays open for as long as any child of the worker lives.
    reader = threading.Thread(target=said.read, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:  # an interruption must not leave it on the device
        process.terminate()  # a launcher ends its processes, too
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_S)
        process.kill()
        process.wait()
    reader.join(LAST_WORDS_S)
    return outcome(said, code)


def outcome(said: Output, code: int | None) -> dict[str, Any]:
    """Return the result of a worker that has ended with this exit status, None where it took too long."""
    result = dict(said.result)
    if result.pop("done", False):
        result.pop("error", None)  # of what came after the measurement
    elif "error" not in result:
        result["error"] = end(code, said.last)
    return result


def end(code: int | None, last: str) -> str:
    """Return how a worker ended that gave no result; its exit status is None where it took too long."""
    if code is None:
        how = "timed out"
    elif code >= 0:
        how = f"exit status {code}"
    else:
        hint = ", most likely for want of host memory" if -code == signal.SIGKILL else ""
        how = f"ended by {signal.Signals(-code).name}{hint}"
    return f"{how}; last line: {last}" if last else how
