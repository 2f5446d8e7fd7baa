"""The command `geminifx calibrate`: measures this machine's rates, by which later plans go."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...runtime.distributed.ranks import Ranks
from ..memory.device import Device
from ..options import Options
from ..rates.calibrate import THOROUGH, BusyError, calibrate
from ..rates.identity import Identity
from ..rates.kept import MachineRates, keep, write
from ..rates.presets import CARDS
from ..rates.rates import ARENA, Products, Rates
from ..small_models import corrected_by_steps
from .errors import shown_errors
from .launch import rank

RATES_HELP = f"Plan for a card ({', '.join(CARDS)}), or by a file of geminifx calibrate; by default for this machine."

BUSY = 3
"""Exit code if the machine was too busy to be measured."""

commands = typer.Typer()


@commands.command("calibrate")
def calibrate_command(
    output: Annotated[
        Path | None, typer.Option(help="Write the rates to this file too, for rates= on other machines.")
    ] = None,
) -> None:
    """Measure what this machine does in a second, in a minute or two, and keep it for all plans made here.

    Matmuls, operators, copies and updates are measured on a GPU and its host, alone, at the same time and in training
    steps of small models; under torchrun, so is what the processes exchange. Let nothing else run meanwhile: on a busy
    machine nothing is changed.
    """
    console = Console(quiet=rank() > 0)
    with shown_errors():
        device = Device.choose(Options()).torch_device
        if device.type != "cuda":
            console.print(f"There is no CUDA device, so nothing was measured: plans use the rates of {ARENA.name}.")
            console.print(rates_table(ARENA))
            return
        ranks = Ranks.of(lambda launched: Options().degrees.mesh(None, launched), device)
        machine = Identity.of(device, ranks.on_this_host)
        console.print(f"measuring {machine.gpu}, {machine.cpu}", highlight=False, markup=False)
        try:
            rates = calibrate(device, THOROUGH, ranks)
            if not ranks.together:
                rates = corrected_by_steps(rates, device)
        except BusyError as busy:
            console.print(f"Nothing was changed: {busy}", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(BUSY) from None
        console.print(rates_table(rates))
        if rank() == 0:
            _write(MachineRates(machine, rates), output, console)


def _write(kept: MachineRates, output: Path | None, console: Console) -> None:
    """Writes the rates to the cache, and to `output` if given."""
    if output is not None:
        write(kept, output)
    path = keep(kept) or output
    console.print(f"kept in {path}" if path else "There is no cache to keep the rates in; name a file with --output",
                  highlight=False, markup=False, soft_wrap=True)  # fmt: skip


def rates_table(rates: Rates) -> Table:
    """A table of the machine's rates."""
    table = Table(title=rates.name, title_justify="left", show_header=False)
    for field in fields(rates):
        value = getattr(rates, field.name)
        if isinstance(value, Products):
            for flop, flops_per_s in zip(value.flop, value.flops_per_s, strict=True):
                size = f" of {flop / 1e9:,.3g} GFLOP" if len(value.flop) > 1 else ""
                table.add_row(f"{field.name} products{size}", f"{flops_per_s / 1e12:,.3g} TFLOP/s")
        elif field.name.endswith("_per_s"):
            what = field.name.removesuffix("_per_s").replace("_", " ")
            table.add_row(what, "at once" if value == float("inf") else f"{value / 1e9:,.3g} G/s")
        elif field.name.endswith("_s"):
            table.add_row(field.name.removesuffix("_s").replace("_", " "), f"{value * 1e6:,.3g} us")
    return table
