"""What an optimizer leaves with the store of its states, which it holds.

The store does not hold it, so that both are freed when their user drops them.
"""

from collections.abc import Callable
from typing import Any, NoReturn
from weakref import WeakMethod

from ..isa.errors import StateError


def optimizer_is_gone() -> NoReturn:
    raise StateError(
        "what model.optimizer(...) returned is gone, and with it how parameters are updated; keep it for as long as "
        "the model trains. This model has no other optimizer: compile it anew"
    )


def weak_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, which does not keep its object alive. A call raises StateError where that is gone."""
    held = WeakMethod(method)

    def call(*args: Any) -> Any:
        found = held()
        return optimizer_is_gone() if found is None else found(*args)

    return call
