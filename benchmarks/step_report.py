"""Results of `step_time.py` as a table and as a drawing."""

import importlib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]

LONGEST_ERROR = 160

BAR = 0.8
"""How much of the space between two points is bars."""


def show(results: list[Result]) -> None:
    """Print a line for each result, in the order given."""
    table = Table(title=headline(results))
    table.add_column("model, batch x sequence")
    table.add_column("system")
    for name in ("s/step", "tokens/s", "device peak", "host RSS"):
        table.add_column(name, justify="right")
    table.add_column("first and last loss, or what went wrong")
    above = None
    for result in results:
        if above not in (None, label(result)):
            table.add_section()
        above = label(result)
        table.add_row(above, result["system"], *cells(result))
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


def cells(result: Result) -> list[str]:
    """Return the figures of a result, or its error, as text."""
    if "error" in result:
        error = result["error"]
        return ["-", "-", "-", "-", error if len(error) <= LONGEST_ERROR else error[:LONGEST_ERROR] + "..."]
    if "step_s" not in result:
        planned = f"planned peak {gib(result['planned_peak_bytes'])}, host {gib(result['planned_host_bytes'])}"
        step_s = result["planned_step_s"]
        return ["-", "-", "-", "-", f"planned step {step_s:.3f} s, {planned}, compiled in {result['compile_s']} s"]
    losses = result["losses"]
    return [
        f"{result['step_s']:.3f}", f"{result['tokens_per_s']:,}", gib(result.get("device_peak_bytes")),
        gib(result.get("host_rss_bytes")), f"{losses[0]:.3f} {losses[-1]:.3f}",
    ]  # fmt: skip


def gib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.1f} GiB"


def label(result: Result) -> str:
    """Return what was measured: the point, and what of its step is not as usual."""
    length = f" x {result['seq']}" if result["seq"] else " images"
    more = [
        f"{result['accumulate']} backwards" if result.get("accumulate", 1) > 1 else "",
        f"{result['microbatches']} microbatches" if result.get("microbatches") else "",
        f"dropout {result['dropout']}" if result.get("dropout") else "",
        "padded" if result.get("pad") else "",
    ]
    return ", ".join([f"{result['model']}, {result['batch']}{length}", *filter(None, more)])


def headline(results: list[Result]) -> str:
    """Return on what and within what the results were measured."""
    found = [sorted({str(r[key]) for r in results if r.get(key)}) for key in ("gpu", "torch", "budget")]
    gpus, torches, budgets = found
    budget = f"budget {' and '.join(budgets)}" if budgets else "no budget"
    return f"{' and '.join(gpus) or 'CPU'}, torch {' and '.join(torches) or 'unknown'}, {budget}"


def plot(results: list[Result], file: Path) -> None:
    """Draw seconds per step as bars, a group for each point; the file's suffix chooses the format.

    Raises SystemExit where matplotlib is not installed.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise SystemExit("--plot needs matplotlib: pip install 'geminifx[bench]'") from None
    points = list(dict.fromkeys(map(label, results)))
    systems = list(dict.fromkeys(result["system"] for result in results))
    latest = {(label(result), result["system"]): result for result in results}
    figure = figures.Figure(figsize=(2 + 1.8 * len(points), 4), layout="constrained")
    axes = figure.add_subplot()
    width = BAR / len(systems)
    for j, system in enumerate(systems):
        places = [i - BAR / 2 + (j + 0.5) * width for i in range(len(points))]
        cases = [latest.get((name, system), {}) for name in points]
        bars = axes.bar(places, [case.get("step_s", 0) for case in cases], 0.92 * width, label=system)
        texts = [f"{c['step_s']:.2f}" if "step_s" in c else "failed" if c else "" for c in cases]
        axes.bar_label(bars, texts, padding=2, fontsize=7, rotation=90)
    axes.set_xticks(range(len(points)), points)
    axes.set_ylabel("seconds per step")
    axes.set_title(headline(results), fontsize=9)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file)
