"""What the command line shows: progress during training, tables after it, errors as a panel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ...models.recipe.recipe import Report, StepInfo
from ...runtime.isa.units import format_bytes

_LINES_WITHOUT_TERMINAL = 10


class ReportedModel(Protocol):
    """The part of a compiled model that reports read: its plan and its memory statistics."""

    plan: Any
    stats: Any


def error_panel(error: Exception) -> Panel:
    """Return a red panel with the error's message, without a traceback."""
    return Panel(escape(str(error) or type(error).__name__), title="geminifx", border_style="red", title_align="left")


def memory_line(compiled: ReportedModel) -> str:
    """Return peak device bytes so far, with the budget, and peak host bytes."""
    used, budget = format_bytes(compiled.stats.device_peak_bytes), compiled.plan.request.budget_bytes
    of_budget = "" if budget is None else f" / {format_bytes(budget)}"
    return f"device {used}{of_budget}  host {format_bytes(compiled.stats.host_peak_bytes)}"


class StepProgress:
    """Shows each step: as a bar on a terminal, else as about ten lines of text in all."""

    def __init__(self, console: Console, compiled: ReportedModel, steps: int) -> None:
        self._console, self._compiled, self._steps = console, compiled, steps
        self._bar = Progress(
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, line="")

    def __call__(self, info: StepInfo) -> None:
        """Show a finished step."""
        rate = info.tokens / max(info.step_s, 1e-9)
        line = f"loss {info.loss:.3f}  {rate:,.0f} tokens/s  {memory_line(self._compiled)}"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=info.step, line=line)
        elif info.step % max(1, self._steps // _LINES_WITHOUT_TERMINAL) == 0 or info.step == self._steps:
            self._console.print(f"step {info.step}/{self._steps}  {line}", highlight=False, soft_wrap=True)

    @contextmanager
    def shown(self) -> Iterator[StepProgress]:
        """Show the bar inside the block."""
        with self._bar:
            yield self


def perplexity_line(report: Report) -> str:
    """Return the held-out perplexity before and after training, and the speed."""
    after = "not judged yet" if report.perplexity_after is None else f"{report.perplexity_after:,.1f}"
    speed = f" ({report.tokens_per_s:,.0f} tokens/s)" if report.losses else ""
    return f"held-out perplexity: {report.perplexity_before:,.1f} before, {after} after{speed}"


def memory_table(compiled: ReportedModel, plain_bytes: int | None) -> Table:
    """Return planned and measured memory beside the budget, with plain PyTorch's peak if known."""
    table = Table(title="Memory", title_justify="left", min_width=56)
    table.add_column("")
    table.add_column("bytes", justify="right")
    table.add_column("of budget", justify="right")
    budget = compiled.plan.request.budget_bytes
    rows = {
        "device, budget": budget,
        "device, planned peak": compiled.plan.peak_bytes,
        "device, measured peak": compiled.stats.device_peak_bytes,
        "plain PyTorch, measured peak": plain_bytes,
    }
    for name, count in rows.items():
        if count is not None:
            table.add_row(name, format_bytes(count), "" if budget is None else f"{count / budget:.0%}")
    table.add_row("host, measured peak", format_bytes(compiled.stats.host_peak_bytes), "")
    table.add_row("moved to the device", format_bytes(compiled.stats.to_device_bytes), "")
    table.add_row("moved to the host", format_bytes(compiled.stats.to_host_bytes), "")
    return table
