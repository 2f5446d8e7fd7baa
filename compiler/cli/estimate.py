"""The command `geminifx estimate`: what training a model within budgets takes, per format of its training state."""

from __future__ import annotations

import json
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...models.presets import empty_model
from ...runtime.isa.units import format_bytes, format_seconds
from ..estimate import ROWS, Estimated, Machine, estimates
from ..rates.choice import OTHER_CARD, given_rates, rates_of
from ..rates.rates import Rates
from .calibrate import RATES_HELP
from .compare import MOST_EXAMPLES, batch_by_shapes
from .errors import shown_errors

commands = typer.Typer()


def estimate_table(found: list[Estimated], tokens: int, title: str) -> Table:
    """One row per format: its memory and speed, or what it lacks. `tokens` are those of a step."""
    table = Table("training state", "trained", "device", "host", "step", "tokens/s", "what binds", title=title)
    for each in found:
        trained = _count(each.trained)
        if each.plan is None:
            tier, smallest_bytes = each.lacking or ("", 0)
            told = each.reason or f"the {tier}: {format_bytes(smallest_bytes)} would do"
            table.add_row(each.state, trained, "-", "-", "-", "-", told)
            continue
        expected = each.plan.estimate
        speed = f"{tokens / expected.step_s:,.0f}" if expected.step_s else "-"
        table.add_row(
            each.state, trained, format_bytes(each.plan.peak_bytes), format_bytes(expected.host_bytes),
            format_seconds(expected.step_s), speed, expected.binds,
        )  # fmt: skip
    return table


def _count(number: int) -> str:
    """A number of parameters as text, in billions or millions."""
    unit, name = (10**9, "B") if number >= 10**9 else (10**6, "M")
    return f"{number / unit:,.3g}{name}"


def _rates(name: str | None) -> Rates:
    """The rates that `name` says; by default those known for this machine's GPU or, without a GPU, a preset's."""
    if name is None and torch.cuda.is_available():
        return rates_of(torch.device("cuda", torch.cuda.current_device()), None, 1, 0)
    found = given_rates(name or OTHER_CARD)
    assert found is not None
    return found


@commands.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Hub name, directory, config file (.json) or preset.")],
    device_budget: Annotated[str | None, typer.Option(help="Device memory, such as 24GB; by default no limit.")] = None,
    host_budget: Annotated[str, typer.Option(help="Host memory for training state.")] = "128GB",
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_EXAMPLES, help="Examples in a step.")] = 1,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per example.")] = None,
    rates: Annotated[str | None, typer.Option(help=RATES_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Plan a training step of MODEL with AdamW for each format of training state; show what fits and how fast it is.

    Nothing is run and no weight is read: the configuration is enough. Part of the device budget is left free for what
    CUDA takes besides tensors.
    """
    transformers.utils.logging.set_verbosity_error()
    with shown_errors():
        machine = Machine.of(device_budget, host_budget, _rates(rates))
        batch = batch_by_shapes(empty_model(model), batch_size, seq_len)
        tokens = next(iter(batch.values())).numel()
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        found = []
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"capturing and planning: {ROWS[0].state}", total=len(ROWS))
            for each in estimates(lambda: empty_model(model), batch, machine):
                found.append(each)
                following = ROWS[len(found)].state if len(found) < len(ROWS) else "done"
                progress.update(task, advance=1, description=f"planning: {following}")
    if as_json:
        typer.echo(json.dumps([each.to_dict(tokens) for each in found], indent=1))
        return
    device = "no limit" if machine.device_bytes is None else format_bytes(machine.device_bytes)
    title = (
        f"{model}, {_count(found[0].parameters)} parameters, {tokens:,} tokens a step\n{device} of device memory, "
        f"{format_bytes(machine.host_bytes)} of host memory, at the rates of {machine.rates.name}"
    )
    Console().print(estimate_table(found, tokens, title))
