"""How a command ends that cannot go on: one panel, no traceback, an exit code."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from ...runtime.isa.errors import GeminiError
from .display import error_panel
from .launch import rank

USER_ERROR = 2
GRACE_S = 5.0
"""Seconds that an error of another rank than 0 waits: where rank 0 has it too, it tells it, and alone."""


@contextmanager
def shown_errors() -> Iterator[None]:
    """Show an error that is meant for the user, and exit: rank 0 at once, another rank where rank 0 did not end the
    run for one of its own."""
    try:
        yield
    except (GeminiError, ValueError, OSError) as error:
        if rank() > 0:
            time.sleep(GRACE_S)
        Console(stderr=True).print(error_panel(error))
        raise typer.Exit(USER_ERROR) from None
