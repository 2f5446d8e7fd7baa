"""The command `geminifx`, assembled from the commands in the other modules."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from . import calibrate, compare, estimate, simulate, train

app = typer.Typer(
    help="Train PyTorch models larger than the device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(train.commands)
app.add_typer(compare.commands)
app.add_typer(estimate.commands)
app.add_typer(simulate.commands)
app.add_typer(calibrate.commands)


def _show_version(wanted: bool) -> None:
    """Print the version and exit, if asked to."""
    if wanted:
        Console().print(f"geminifx {version('geminifx')}", highlight=False)
        raise typer.Exit()


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Train PyTorch models larger than the device."""
