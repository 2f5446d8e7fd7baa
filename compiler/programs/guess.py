"""Marks errors of planning for a guessed batch as such."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...runtime.isa.errors import BudgetError


@contextmanager
def of_a_guess() -> Iterator[None]:
    """Within, a step is captured and planned for inputs made from the model's configuration; errors say so."""
    try:
        yield
    except BudgetError as error:
        error.args = (f"{error}; these inputs are a guess: pass the batch you train on as example_inputs=",)
        raise
    except Exception as error:
        error.add_note("in a batch that was guessed from the model's configuration; pass your own as example_inputs=")
        raise
