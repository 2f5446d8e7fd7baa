"""A loss that the model does not compute: with `loss_fn=` the compiled forward is the model's and that."""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from ..runtime.isa.errors import ArgumentError, wrong_argument

LossFn = Callable[..., Any]
EXPECTED = "a function of what the model returns and of arguments by name, such as lambda output, labels: ..."


def with_loss(model: nn.Module, loss_fn: LossFn) -> MethodType:
    """A forward for the model, which returns the loss where it is called with arguments of the loss function, and else
    what the model returns. Those are by name; all others are the model's."""
    names, forward = [parameter.name for parameter in targets(loss_fn)], model.forward

    def computing(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        output = forward(*args, **kwargs)
        return loss_fn(output, **given) if given else output

    computing.__signature__ = _signature(inspect.signature(forward), targets(loss_fn))  # type: ignore[attr-defined]
    return MethodType(computing, model)


def targets(loss_fn: LossFn) -> list[inspect.Parameter]:
    """What a loss function takes behind the model's output. Raises ArgumentError for what is no such function."""
    if not callable(loss_fn):
        raise wrong_argument("loss_fn", loss_fn, EXPECTED)
    if isinstance(loss_fn, nn.Module) and next(loss_fn.parameters(), None) is not None:
        raise ArgumentError("loss_fn has parameters, which nobody would train; make it a part of the model")
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except ValueError:
        raise wrong_argument("loss_fn", loss_fn, EXPECTED) from None
    _, *behind = signature.parameters.values() or (None,)
    if not behind or any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in behind):
        raise ArgumentError(f"loss_fn takes {signature}; expected {EXPECTED}")
    return behind


def _signature(model: inspect.Signature, behind: list[inspect.Parameter]) -> inspect.Signature:
    """The model's, with what the loss takes, where there is one; a name of both is the loss's. The first is the
    method's self."""
    names = {parameter.name for parameter in behind}
    every = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    every += [parameter for parameter in model.parameters.values() if parameter.name not in names]
    for each in behind:
        default = None if each.default is inspect.Parameter.empty else each.default
        every.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=default))
    return inspect.Signature(sorted(every, key=lambda parameter: parameter.kind))
