"""The one CSV that all results are appended to: a line each, with what was measured, on what, and by which code."""

import csv
import os
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent

COLUMNS = (
    "time", "commit", "gpu", "cpus", "torch", "command",
    "system", "detail", "model", "batch", "seq", "accumulate", "microbatches", "dropout", "pad",
    "budget", "host_budget", "nprocs", "steps", "steps_counted",
    "step_s", "tokens", "tokens_per_s", "device_peak_bytes", "host_bytes", "host_used_bytes",
    "planned_peak_bytes", "planned_host_bytes", "compile_s", "setup_s", "first_loss", "last_loss", "error",
)  # fmt: skip
"""
time: in UTC. commit: of this checkout, `+dirty` where tracked files other than CSVs differ from it.
system: with how it is parallel, where that was declared. batch: of one backward. pad: True or False.
steps_counted: over how many the median was taken. tokens: of a step, padding left out; for images, how many.
device_peak_bytes: the driver's count; of ours without a GPU, what its arena in RAM held at most.
host_bytes: resident in the process. host_used_bytes: how much less memory the machine had free than before, which
includes pinned memory that is not resident, and what other programs took meanwhile.
planned_...: ours alone. compile_s: ours its plan and program, torch.compile its first forward and backward.
"""


def check_columns(file: Path) -> None:
    """Raises SystemExit where the file exists and is not one of ours with the same columns."""
    if not file.exists():
        return
    with file.open(newline="", encoding="utf-8") as lines:
        found = tuple(next(csv.reader(lines), ()))
    if found and found != COLUMNS:
        odd = sorted(set(found) ^ set(COLUMNS)) or ["another order"]
        raise SystemExit(
            f"{file} has other columns than are written now ({', '.join(odd)}): nothing was measured. Move it away, or "
            "name another one with --csv"
        )


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a line to the file, which is made with its header where there is none. What `row` lacks stays empty.

    Raises ValueError for a name that is no column.
    """
    fresh = not file.exists() or file.stat().st_size == 0
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def row(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result of `step_time.py` in the CSV's columns."""
    stats, losses = result.get("stats", {}), result.get("losses", ())
    derived = {
        "device_peak_bytes": result.get("device_peak_bytes", stats.get("device_peak_bytes")),
        "host_bytes": result.get("host_rss_bytes"),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }
    return {column: derived.get(column, result.get(column)) for column in COLUMNS}


def provenance(command: Sequence[str], commit: str | None = None) -> dict[str, Any]:
    """Return by what and when a result is made; `commit` is what to say where this is no git checkout."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit_of(ROOT) or commit or "unknown",
        "cpus": len(os.sched_getaffinity(0)), "torch": torch.__version__, "command": shlex.join(command),
    }  # fmt: skip


def commit_of(directory: Path) -> str | None:
    """Return the commit that is checked out, with `+dirty` where tracked files were changed; None without git.

    CSVs do not count: each result would make the next one's checkout dirty.
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(directory), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top,glob)**/*.csv")
    return f"{commit}+dirty" if commit and changed else commit
