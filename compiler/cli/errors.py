"""How a failing command ends: a panel, no traceback, an exit code."""

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
"""Seconds for which ranks other than 0 hold back an error: if rank 0 has it too, only rank 0 reports it."""


@contextmanager
def shown_errors() -> Iterator[None]:
    """Show an error that is meant for the user, and exit. Rank 0 does so at once; other ranks wait, in case rank 0 ends
    the run first."""
    try:
        yield
    except (GeminiError, ValueError, OSError) as error:
        if rank() > 0:
            time.sleep(GRACE_S)
        Console(stderr=True).print(error_panel(error))
        raise typer.Exit(USER_ERROR) from None
