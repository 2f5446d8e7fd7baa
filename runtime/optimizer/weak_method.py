"""What an optimizer leaves with the model and with the store of its states, both of which it holds.

They do not hold it, so that all are freed when their user drops them.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from ..isa.errors import StateError


def weak_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, which does not keep its object alive. A call raises StateError where that is gone."""
    held = WeakMethod(method)

    def call(*args: Any) -> Any:
        found = held()
        if found is None:
            raise StateError(
                "what model.optimizer(...) returned is gone, and with it how parameters are updated; keep it for as "
                "long as the model trains. This model has no other optimizer: compile it anew"
            )
        return found(*args)

    return call
