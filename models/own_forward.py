"""A module's own forward, which stands in front of its class's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def having_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within, `forward` is the module's own attribute; None: it has only its class's."""
    attributes = vars(module)
    before = attributes.get("forward")
    try:
        _set_forward(attributes, forward)
        yield
    finally:
        _set_forward(attributes, before)


def _set_forward(attributes: dict[str, Any], forward: Any) -> None:
    if forward is None:
        attributes.pop("forward", None)
    else:
        attributes["forward"] = forward
