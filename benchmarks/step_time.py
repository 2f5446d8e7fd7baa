"""Seconds per training step of OPT by several systems: same weights, tokens, device budget, machine and run.

    python benchmarks/step_time.py --points 1.3b:8 2.7b:8 --budget 24GiB --systems ours fsdp2 --json step_time.json
    python benchmarks/step_time.py --points 1.3b:16 --budget none --nprocs 8 --systems ours fsdp2 --parallel zero=3
    python benchmarks/step_time.py --plot step_time.json -o step_time.svg    # needs matplotlib

Random weights, random tokens, dropout 0, AdamW. Every point (model:batch) of every system (`contestants.py`) runs
in a process of its own, so that one which is out of memory is a line of the table like any other. The device is
synchronised after each step; the figure is the median without the first three steps. Device bytes are the
driver's, of rank 0 where there are several processes, which share the batch. On a machine without a GPU everything
runs on the CPU, which shows that it runs: try `--points mini:2 --seq 128 --budget none`.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from contestants import SYSTEMS, Contestant, Setup
from geminifx.compiler.cli.launch import rank
from random_opt import preset
from step_report import plot, show

WARM_UP = 3
MARK = "RESULT "
LAST_WORDS_S = 5.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", type=point, default=[("1.3b", 8)], help="model:batch, such as 2.7b:8")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["ours", "fsdp2", "plain"])
    parser.add_argument("--seq", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--budget", default="24GiB", help='of device memory, such as "24GiB", or "none"')
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--nprocs", type=int, default=1, help="processes, one for each GPU: ours and fsdp2 only")
    parser.add_argument("--timeout-s", type=float, default=600, help="for one system at one point, its start included")
    parser.add_argument("--json", type=Path, default=None, help="write results here, after each one anew")
    parser.add_argument("--plot", type=Path, nargs="+", default=None, help="draw saved results, measure nothing")
    parser.add_argument("-o", "--output", type=Path, default=Path("step_time.svg"), help="where --plot draws to")
    parser.add_argument("--worker", action="store_true", help="measure the first system at the first point right here")
    only = parser.add_argument_group("for ours only")
    only.add_argument("--plan", default=None, help="a plan saved as JSON")
    only.add_argument("--recompute", default="auto", help="auto, none, all, or how many of the first layers")
    only.add_argument("--parallel", nargs="+", default=[None], help="each to be measured, such as data=2,tensor=1d:4")
    only.add_argument("--host-budget", default=None, help='of host memory, such as "100GiB"')
    only.add_argument("--profile", type=Path, default=None, help="trace one step more to this file; several runs: "
                      "to FILE-MODEL-BATCH-SYSTEM")  # fmt: skip
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be 1 or more")
    if args.plan and len(args.points) > 1:
        parser.error("--plan is for one point")
    alone = [system for system in args.systems if not system.startswith("ours") and system != "fsdp2"]
    if args.nprocs > 1 and alone:
        parser.error(f"{alone[0]} is measured in one process only")
    return args


def point(text: str) -> tuple[str, int]:
    """Return ("1.3b", 8) for "1.3b:8"."""
    size, _, batch = text.partition(":")
    try:
        preset(size)
        return size, int(batch)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no model:batch, such as 1.3b:8 ({error})") from error


# -- one measurement, in a process of its own ------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Measure the first system at the first point, print the result as one line, and end the process."""
    (size, batch), system = args.points[0], args.systems[0]
    budget = None if args.budget == "none" else args.budget
    setup = Setup(size, batch, args.seq, budget, args.nprocs, args.host_budget, args.plan, args.recompute,
                  args.parallel[0])  # fmt: skip
    result: dict[str, Any] = {"torch": torch.__version__, "budget": budget}
    try:
        if setup.device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            result["gpu"] = torch.cuda.get_device_name()
        start = time.perf_counter()
        contestant = SYSTEMS[system](setup)
        result |= {"setup_s": round(time.perf_counter() - start, 1), **contestant.facts}
        result |= measure(contestant, args.steps, batch * args.seq)
        tell(result)  # a profile that fails must not cost what was measured
        if args.profile and contestant.profile:
            print(contestant.profile(str(args.profile)), flush=True)
    except Exception as error:
        traceback.print_exc()
        if "step_s" not in result:
            lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
            tell(result | {"error": lines[0][:500]})
    sys.stderr.flush()
    os._exit(0)  # an orderly end unpins and frees all host memory, which takes longer than the steps


def tell(result: dict[str, Any]) -> None:
    """Print a result for the process that collects them."""
    if rank() == 0:
        print("\n" + MARK + json.dumps(result), flush=True)


def measure(contestant: Contestant, steps: int, tokens: int) -> dict[str, Any]:
    """Run steps of so many tokens and return seconds, losses and bytes."""
    seconds, losses, usage = [], [], {}
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
        usage = {name: max(value, usage.get(name, 0)) for name, value in bytes_in_use().items()}
        if rank() == 0:
            print(f"step {i}: {seconds[-1]:.3f} s, loss {losses[-1]:.4f}", flush=True)
    median = statistics.median(seconds[min(WARM_UP, steps // 2) :])
    return {
        "step_s": round(median, 4), "tokens_per_s": round(tokens / median),
        "all_steps_s": [round(s, 4) for s in seconds], "losses": [round(loss, 4) for loss in losses],
        **usage, **contestant.final_facts(),
    }  # fmt: skip


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bytes_in_use() -> dict[str, int]:
    """Return host bytes now, and device bytes: the driver's count now, the allocator's peak since it was reset,
    and at that peak what the driver would have counted."""
    usage = {"host_rss_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_reserved()
        usage |= {"driver_bytes": total - free, "reserved_peak_bytes": peak,
                  "device_peak_bytes": total - free - torch.cuda.memory_reserved() + peak}  # fmt: skip
    return usage


# -- all measurements ------------------------------------------------------------------------------------------


@dataclass
class Output:
    """What a worker has printed: its result, where it gave one, and its last line."""

    result: dict[str, Any] | None = None
    last: str = ""

    def read(self, lines: Iterable[str]) -> None:
        """Print the lines, indented, as they come."""
        for line in lines:
            if line.startswith(MARK):
                self.result = json.loads(line.removeprefix(MARK))
            else:
                self.last = line.strip() or self.last
                print("   ", line, end="", flush=True)


def run_worker(args: argparse.Namespace, size: str, batch: int, system: str, parallel: str | None) -> dict[str, Any]:
    """Measure in a fresh process, or several; how it failed, if it did, is `error` in the result."""
    if system == "deepspeed" and find_spec("deepspeed") is None:
        return {"error": "not installed"}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.nprocs}"]
    command = [sys.executable, *(launch if args.nprocs > 1 else []), __file__, *sys.argv[1:], "--worker"]
    command += ["--points", f"{size}:{batch}", "--systems", system, *(["--parallel", parallel] if parallel else [])]
    if args.profile and len(args.points) * len(args.systems) > 1:
        command += ["--profile", str(args.profile.with_stem(f"{args.profile.stem}-{size}-{batch}-{system}"))]
    environment = dict(os.environ)
    if not system.startswith("ours"):  # ours sets it by itself
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    said = Output()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", env=environment)  # fmt: skip
    # A thread reads, since the pipe stays open for as long as any child of the worker lives.
    reader = threading.Thread(target=said.read, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(args.timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:  # an interruption must not leave it on the device
        process.terminate()  # a launcher ends its processes, too
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_S)
        process.kill()
        process.wait()
    reader.join(LAST_WORDS_S)
    return said.result or {"error": end(code, said.last)}


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


def ways(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Return the systems, ours once for each way to be parallel."""
    return [(system, parallel) for system in args.systems
            for parallel in (args.parallel if system.startswith("ours") else [None])]  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.worker:
        work(args)
    if args.plot:
        plot([result for file in args.plot for result in json.loads(file.read_text())["results"]], args.output)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    results: list[dict[str, Any]] = []
    for size, batch in args.points:
        for system, parallel in ways(args):
            name = f"{system} {parallel}" if parallel else system
            print(f"{size}:{batch} {name}", flush=True)
            result = run_worker(args, size, batch, system, parallel)
            results.append({"model": size, "batch": batch, "seq": args.seq, "system": name, **result})
            print("   ", json.dumps(results[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"command": sys.argv[1:], "results": results}, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
