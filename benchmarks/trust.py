"""Predicted against measured: a step's seconds and its device peak, over models, budgets and batches.

    geminifx calibrate
    python benchmarks/trust.py --models opt-1.3b opt-2.7b --budgets 6GB 12GB 24GB --batches 1 8 16 --json trust.json
    python benchmarks/trust.py --models llama-3b --budgets 24GB --batches 8 --accumulate 4 --json trust.json
    python benchmarks/trust.py --models llama-3b --batches 64 --microbatches auto 8 16 --json trust.json
    python benchmarks/trust.py --docs --within-s 560 --json trust.json --table docs/trust.md    # the docs' cells
    python benchmarks/trust.py --json trust.json --table docs/trust.md    # measures nothing

A model has a process of its own, in which it is planned anew for each cell, with nine steps. The second and third run
by the first plan, and tell how good the calibration is; then the warm-up decides again, and may once more take back
what it changed. The last three tell how good the plan is that it leaves, which never saw them. Cells that the file has
already are not measured again, so that a table may be filled in several goes, and one that failed is tried again; none
is begun that would not be done `--within-s`, going by the longest so far of its model. On a machine without a GPU the
arena is the device: `--models mini --seq 128 --budgets none` shows that it runs.
"""

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import tell
from processes import run_worker
from random_models import full_name
from systems.base import synchronize
from systems.ours import Ours
from task import Task

FIRST, LAST, STEPS = slice(1, 3), slice(6, 9), 9
"""The steps that are compared with the first plan and with the last one, and the number of all."""

KINDS = {"s": "step", "adapted_s": "step after the warm-up", "bytes": "device peak"}
"""What is predicted and measured."""

Cell = dict[str, Any]
DOCS = (
    ("opt-1.3b", ("6GB", "12GB", "24GB", "48GB"), (1, 8), (None,)),
    ("llama-1b", ("6GB", "12GB", "24GB"), (8,), (None,)),
    ("opt-2.7b", ("12GB", "24GB", "48GB"), (4, 16), (None,)),
    ("gpt2-xl", ("6GB", "24GB"), (4,), (None,)),
    ("llama-3b", ("24GB", "48GB"), (8,), (None,)),
    ("llama-3b", ("24GB",), (64,), (8, 16)),
)
"""The cells of the docs' table: models, budgets, batches and microbatches."""

POINT = ("model", "batch", "seq", "accumulate", "microbatches", "budget")
"""What a cell is of."""


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", type=full_name, default=[], help="such as opt-1.3b or llama-3b")
    made.add_argument("--docs", action="store_true", help="the cells of the docs' table, beside those that are named")
    made.add_argument("--within-s", type=float, default=math.inf, help="begin no cell that would end later")
    made.add_argument("--budgets", nargs="+", default=["24GB"], help='of device memory, or "none"')
    made.add_argument("--batches", nargs="+", type=int, default=[8], help="sequences of one backward")
    made.add_argument("--seq", type=int, default=1024, help="tokens per sequence")
    made.add_argument("--accumulate", type=int, default=1, metavar="K", help="backwards in a step")
    made.add_argument("--microbatches", nargs="+", type=parts, default=[None], help='of a backward, or "auto"')
    made.add_argument("--json", type=Path, required=True, help="the cells, to which this call's are added")
    made.add_argument("--table", type=Path, default=None, help="write all cells of --json here, as Markdown")
    made.add_argument("--timeout-s", type=float, default=3600.0, help="for one model")
    made.add_argument("--worker", default=None, metavar="MODEL", help="measure this one right here")
    return made.parse_args(words)


def parts(text: str) -> int | None:
    return None if text == "auto" else int(text)


def tasks(args: argparse.Namespace, model: str, known: Iterable[Cell]) -> list[Task]:
    """The cells of a model that are still to be measured."""
    done = {key(cell) for cell in known if "error" not in cell}
    budgets = [None if budget == "none" else budget for budget in args.budgets]
    wanted = [Task(model, batch, args.seq, args.accumulate, microbatches, budget=budget)
              for budget in budgets for batch in args.batches for microbatches in args.microbatches]  # fmt: skip
    named = wanted if model in args.models else []
    return [task for task in (*named, *documented(args, model)) if tuple(point(task).values()) not in done]


def documented(args: argparse.Namespace, model: str) -> list[Task]:
    """What the docs' table has of a model, where that is asked for."""
    rows = [row[1:] for row in DOCS if args.docs and full_name(row[0]) == model]
    points = (each for row in rows for each in itertools.product(*row))
    return [Task(model, batch, args.seq, 1, microbatches, budget=budget) for budget, batch, microbatches in points]


def models(args: argparse.Namespace) -> list[str]:
    """Those that are named, and the docs'."""
    return list(dict.fromkeys([*args.models, *(full_name(row[0]) for row in DOCS if args.docs)]))


def point(task: Task) -> Cell:
    return {name: getattr(task, name) for name in POINT}


def key(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell.get(name) for name in POINT)  # a file may be older than one of them


# -- measuring -------------------------------------------------------------------------------------------------


def measure(task: Task) -> Cell:
    """One cell: what the plan says before and after the warm-up, and what steps take."""
    ours = Ours(replace(task, declared=replace(task.declared, warmup=True)))
    plan, seconds = ours.model.plan, list[float]()
    gc.collect()  # or the garbage of planning is looked for in a step
    synchronize()
    before = time.perf_counter()
    for _ in range(STEPS):
        ours.step()
        synchronize()
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return {
        "rates": plan.estimate.rates, "binds": plan.estimate.binds, "bound_s": plan.estimate.bound_s,
        "predicted_s": plan.estimate.step_s, "measured_s": statistics.median(seconds[FIRST]),
        "predicted_adapted_s": ours.model.plan.estimate.step_s, "measured_adapted_s": statistics.median(seconds[LAST]),
        "predicted_bytes": plan.peak_bytes, "measured_bytes": ours.model.stats.device_peak_bytes,
    }  # fmt: skip


def work(wanted: list[Task], within_s: float) -> None:
    """Measure as many as can be, tell after every cell of all so far, and end the process."""
    begin_s, longest_s = time.monotonic(), 0.0
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    cells: list[Cell] = []
    for task in wanted:
        cell_s = time.monotonic()
        if cell_s - begin_s + longest_s > within_s:
            break
        cells.append({**point(task), "device": device, "torch": torch.__version__})
        try:
            cells[-1] |= measure(task)
        except Exception as error:
            traceback.print_exc()
            cells[-1]["error"] = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        tell({"cells": cells})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest_s = max(longest_s, time.monotonic() - cell_s)
    tell({"done": True})
    sys.stderr.flush()
    os._exit(0)  # an orderly end unpins and frees all host memory, which takes longer than the steps


def measure_all(args: argparse.Namespace) -> None:
    """Each model in a process of its own; the file has what is measured as soon as its process ends."""
    end_s = time.monotonic() + args.within_s
    for model in models(args):
        known, left_s = read(args.json), end_s - time.monotonic()
        if left_s > 0 and tasks(args, model, known):
            words = [__file__, *sys.argv[1:], "--worker", model, "--within-s", str(left_s)]
            found = run_worker(words, 1, min(args.timeout_s, left_s), expandable=False).get("cells", [])
            again = set(map(key, found))
            kept = [cell for cell in known if key(cell) not in again]
            args.json.write_text(json.dumps([*kept, *found], indent=1) + "\n")


def read(file: Path) -> list[Cell]:
    """The cells of a file, but for those of an older version, which lack something."""
    found: list[Cell] = json.loads(file.read_text()) if file.exists() else []
    return [cell for cell in found if "error" in cell or all(f"predicted_{what}" in cell for what in KINDS)]


# -- the table -------------------------------------------------------------------------------------------------


def errors(cells: Iterable[Cell], what: str) -> list[float]:
    """How far predictions of one of `KINDS` are from what was measured, as shares of that."""
    return [cell[f"predicted_{what}"] / cell[f"measured_{what}"] - 1 for cell in cells if "error" not in cell]


def summary(cells: list[Cell]) -> str:
    """Averages and worst cases."""
    told = []
    for what, name in KINDS.items():
        found = [abs(error) for error in errors(cells, what)]
        told.append(f"{name} {statistics.mean(found):.1%} off on average, {max(found):.1%} at worst")
    above = sum(error < 0 for error in errors(cells, "bytes"))
    return f"{len(errors(cells, 's'))} cells: {'; '.join(told)}; {above} peaks above the planned ones."


def table(cells: list[Cell]) -> str:
    """All cells as Markdown, with where and how they were measured."""
    good = [cell for cell in cells if "error" not in cell]
    where = sorted({f"{cell['device']}, torch {cell['torch']}, at the rates of {cell['rates']}" for cell in good})
    lines = [
        "# Predicted against measured", "",
        "What a plan says that a step takes, and what it took: by the first plan the median of the second and",
        "third step, by the plan that the warm-up leaves that of the seventh to ninth, which it has not seen; and",
        "the highest device memory of all. Cells are measured by `benchmarks/trust.py`, in as many goes as one",
        "likes, and written by `python benchmarks/trust.py --json trust.json --table docs/trust.md`.", "",
        *(["; ".join(where) + ".", "", summary(good), ""] if good else []),
        "| model | batch x tokens | budget | step | predicted | off | binds | at least "
        "| warmed up | predicted | off | peak, of planned |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*lines, *map(line, cells)]) + "\n"


def line(cell: Cell) -> str:
    accumulated = f", {cell['accumulate']} backwards" if cell["accumulate"] > 1 else ""
    divided = f", {cell['microbatches']} microbatches" if cell.get("microbatches") else ""
    first = f"| {cell['model']} | {cell['batch']} x {cell['seq']}{accumulated}{divided} | {cell['budget'] or 'none'} |"
    if "error" in cell:
        return f"{first} {cell['error'].replace('|', '/')}{' |' * 9}"
    off, adapted, peak = (errors([cell], what)[0] for what in KINDS)
    return (
        f"{first} {cell['measured_s']:.3f} s | {cell['predicted_s']:.3f} s | {off:+.1%} | {cell['binds']} | "
        f"{cell['bound_s']:.3f} s | {cell['measured_adapted_s']:.3f} s | {cell['predicted_adapted_s']:.3f} s | "
        f"{adapted:+.1%} | {1 / (1 + peak):.1%} |"
    )


def main() -> None:
    args = parse_args()
    if args.worker:
        work(tasks(args, args.worker, read(args.json)), args.within_s)
    measure_all(args)
    cells = read(args.json)
    if args.table is not None:
        args.table.write_text(table(cells))
    elif any("error" not in cell for cell in cells):
        print(summary(cells))


if __name__ == "__main__":
    main()
