"""Callbacks that an optimizer registers with its store.

The optimizer refers to the store; the store refers back only weakly, so that both are freed when the user drops them.
"""

from collections.abc import Callable
from typing import Any, NoReturn
from weakref import WeakMethod

from ..isa.errors import StateError


def optimizer_is_gone() -> NoReturn:
    raise StateError(
        "the optimizer that model.optimizer(...) returned was garbage-collected, so parameters can no longer be "
        "updated; keep a reference to it for as long as the model trains. This model cannot get another optimizer: "
        "compile it again"
    )


def weak_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, without keeping its object alive. Calling it raises StateError once the object is gone."""
    held = WeakMethod(method)

    def call(*args: Any) -> Any:
        found = held()
        return optimizer_is_gone() if found is None else found(*args)

    return call
