"""Plans for a batch that nobody passed: what goes wrong with it is told to be of a guess."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...runtime.isa.errors import BudgetError


@contextmanager
def of_a_guess() -> Iterator[None]:
    """While a step is captured and planned for inputs that were made from the model's configuration."""
    try:
        yield
    except BudgetError as error:
        error.args = (f"{error}; these are a guess: pass the batch you train on as example_inputs=",)
        raise
    except Exception as error:
        error.add_note("in a batch that was guessed from the model's configuration; example_inputs= has another")
        raise
