"""What torch computes over the parameters of one process alone, where others have more of them, is refused."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from ..isa.errors import StateError
from ..isa.torch_private import watch_clipping
from .elsewhere import Elsewhere
from .lazy_parameter import LazyParameter


@cache
def refuse_them() -> None:
    """From here on, in this process."""
    watch_clipping(_check)


def _check(parameters: Sequence[Any]) -> None:
    """Raises StateError where some of the parameters are of layers that other ranks run."""
    for parameter in parameters:
        source = parameter.source if isinstance(parameter, LazyParameter) else None
        if isinstance(source, Elsewhere):
            raise StateError(
                f"torch clips gradients, or scales them, by what this process has of them, and {source.name} is of "
                f"layers that other ranks run: {source.where}. Every rank would find something else: clip with "
                "model.clip_grad_norm_(...), or max_grad_norm= of model.optimizer(...), whose float16 has a loss scale"
            )
