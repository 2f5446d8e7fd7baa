"""Another process takes the GPU's memory while a model trains, and gives it back: losses stay the same to the bit.

    python benchmarks/second_process.py --model 2.7b --batch 8 --budget 24GiB --less 5GiB

Between two steps the second process takes all of the GPU's memory but `--less` below the most that ours held so far,
and several steps later it frees that. The plan is to shrink and to grow back. Losses are compared with those of a run
that is not disturbed; where they differ, or the plan does not change as told, the process exits with 1. torch's
allocator keeps what it has freed, which nobody else can take, so it lets go of that first; algorithms are those whose
results do not vary.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from geminifx.compiler.memory.device_memory import DeviceMemory
from geminifx.runtime.isa.homes import Where
from geminifx.runtime.isa.units import format_bytes, parse_bytes
from random_models import full_name
from systems.base import synchronize
from systems.ours import Ours
from task import Task

PIECE_BYTES = 2**26
LONGEST_WAIT_S = 120


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="2.7b", help="one of random_models, or a config file")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--seq", type=int, default=1024)
    made.add_argument("--budget", default="24GiB")
    made.add_argument("--less", default="5GiB", help="how far below what ours held")
    made.add_argument("--steps", type=int, nargs=3, default=(4, 6, 24), help="before, meanwhile and afterwards")
    return made


class Second:
    """Another process that takes and frees memory of the GPU. `memory` tells what this process holds of it."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        context = get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_obey, args=(theirs,), daemon=True)
        self.process.start()
        self._answer()

    def leave(self, left_bytes: int) -> int:
        """Takes memory until this process may hold so much of the GPU, up to a piece less, or there is no more.

        Returns the bytes that it took, to which its context comes.
        """
        torch.cuda.empty_cache()
        own_bytes = self.memory.room_bytes() - torch.cuda.mem_get_info()[0]
        self.ours.send(left_bytes - own_bytes)
        return self._answer()

    def free(self) -> int:
        self.ours.send(None)
        return self._answer()

    def _answer(self) -> int:
        if not self.ours.poll(LONGEST_WAIT_S):
            raise TimeoutError(f"the second process did not answer within {LONGEST_WAIT_S} s")
        return int(self.ours.recv())


def _obey(conn: Connection) -> None:
    """Takes memory until no more than so many bytes are free, or frees it all on None, until the other one ends."""
    held = [torch.empty(1, device="cuda")]
    conn.send(0)
    with suppress(EOFError):
        while True:
            free_bytes = conn.recv()
            if free_bytes is None:
                held.clear()
                torch.cuda.empty_cache()
            else:
                _take(held, free_bytes)
            conn.send(sum(piece.nbytes for piece in held))


def _take(held: list[torch.Tensor], free_bytes: int) -> None:
    while torch.cuda.mem_get_info()[0] > free_bytes:
        try:
            held.append(torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cuda"))
        except torch.cuda.OutOfMemoryError:
            return


def trained(contestant: Ours, steps: Sequence[int], less_bytes: int, second: Second | None) -> list[dict[str, Any]]:
    """What every step found. `second` takes memory after the first of `steps` and frees it after the next ones."""
    found: list[dict[str, Any]] = []
    begins, ends = steps[0], steps[0] + steps[1]
    left_bytes = theirs_bytes = 0
    for step in range(sum(steps)):
        if second is not None and step == begins:
            left_bytes = contestant.model.stats.device_peak_bytes - less_bytes
        if second is not None and begins <= step < ends:
            theirs_bytes = second.leave(left_bytes)
        if second is not None and step == ends:
            theirs_bytes = second.free()
        began_s = time.perf_counter()
        loss = contestant.step()
        synchronize()
        plan = contestant.model.plan
        found.append({
            "loss": loss.item(), "step_s": round(time.perf_counter() - began_s, 3), "theirs_bytes": theirs_bytes,
            "on_device": sum(home.where is Where.DEVICE for home in plan.homes), "chunks": len(plan.homes),
            "planned_peak_bytes": plan.peak_bytes,
        })  # fmt: skip
        print(f"step {step}:", json.dumps(found[-1]), flush=True)
    return found


def compared(calm: list[dict[str, Any]], pressed: list[dict[str, Any]], steps: Sequence[int]) -> dict[str, Any]:
    begins, ends = steps[0], steps[0] + steps[1]
    return {
        "the same losses": [one["loss"] for one in calm] == [one["loss"] for one in pressed],
        "it shrank": pressed[begins]["planned_peak_bytes"] < pressed[0]["planned_peak_bytes"],
        "it grew back": pressed[-1]["on_device"] == pressed[0]["on_device"],
        "planned peaks": [format_bytes(pressed[step]["planned_peak_bytes"]) for step in (0, begins, -1)],
        "seconds per step": [pressed[step]["step_s"] for step in (begins - 1, ends - 1, -1)],
    }


def main(words: list[str] | None = None) -> int:
    """Returns the exit status: 1 where something was not as it should be."""
    args = parser().parse_args(words)
    if not torch.cuda.is_available():
        sys.exit("a second process takes memory of a GPU: run this on a machine with one")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it takes time, and nothing reads such memory
    task = Task(full_name(args.model), args.batch, args.seq, budget=args.budget)
    less_bytes = parse_bytes(args.less, of=0)
    calm = trained(Ours(task), args.steps, less_bytes, None)
    gc.collect()
    torch.cuda.empty_cache()
    ours = Ours(task)
    pressed = trained(ours, args.steps, less_bytes, Second(ours.model.session.device.memory))
    told = compared(calm, pressed, args.steps)
    print(json.dumps(told), flush=True)
    return int(False in told.values())


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # an orderly end unpins and frees all host memory, which takes longer than the steps
