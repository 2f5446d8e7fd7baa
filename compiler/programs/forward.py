"""The forward of a compiled module, and replacements that tools assign to it.

A method that is assigned, such as one that computes a loss from hidden states, becomes the model's new forward and is
captured; so are the model's own forward and a loss function given to compile. A function that is assigned, such as
accelerate's that converts outputs, runs around the compiled forward.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

from torch import nn

from ...models.own_forward import having_forward
from ..options import LossFn, loss_targets


class OwnForward:
    """A function as the forward of one module, to be stored as the module's attribute. Unlike a bound method, it does
    not keep the module alive."""

    def __init__(self, function: Callable[..., Any], module: nn.Module, signature: inspect.Signature) -> None:
        self.function, self._module, self.__signature__ = function, weakref.ref(module), signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self._module(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnForward:
        return OwnForward(self.function, copy.deepcopy(self._module(), memo), self.__signature__)


Step = Callable[["Forward", tuple[Any, ...], dict[str, Any]], Any]


class Forward:
    """A forward of the source; each call runs it as a compiled step.

    A new forward may have kept the old one, to call it. While the new one runs, on the source or on the copy that is
    captured, such a call runs directly on that same model. `method` is the source's own `forward` attribute; None if it
    has only its class's.
    """

    def __init__(self, source: nn.Module, step: Step) -> None:
        self._source, self._step = source, step
        self.method = vars(source).get("forward")
        self._running: list[nn.Module] = []
        self.__signature__ = inspect.signature(source.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._running:
            return self._step(self, args, kwargs)
        return _called(self._running[-1], self.method, args, kwargs)

    def replaced_by(self, method: MethodType) -> Forward:
        """The compiled forward that runs a method of the compiled module in place of this one."""
        function = method.__func__
        if isinstance(function, Forward):  # accelerate binds the forward it finds when it unwraps a model
            return function

        running = self._running

        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            running.append(model)
            try:
                return function(model, *args, **kwargs)
            finally:
                running.pop()

        new = Forward(self._source, self._step)
        new._running = running
        # A wrapper of the forward of the compiled module's class, which is nn.Module's, takes the source's arguments.
        of_class = getattr(function, "__wrapped__", None) is nn.Module.forward
        new.__signature__ = self.__signature__ if of_class else inspect.signature(method)
        new.method = OwnForward(forward, self._source, new.__signature__)
        return new

    @contextmanager
    def in_source(self) -> Iterator[None]:
        """Within, the source's own forward is this one, uncompiled."""
        with having_forward(self._source, self.method):
            yield


def _called(model: nn.Module, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a model's forward; `method` is the `forward` attribute of the model, or of the one it is a copy of."""
    if isinstance(method, MethodType | OwnForward):
        function = method.__func__ if isinstance(method, MethodType) else method.function
        return function(model, *args, **kwargs)
    return type(model).forward(model, *args, **kwargs) if method is None else method(*args, **kwargs)


def with_loss(source: nn.Module, loss_fn: LossFn) -> MethodType:
    """A forward that returns the loss if it is called with arguments of the loss function, and the model's output
    otherwise. It also returns the output if every required one that is given is None. Arguments of the loss are passed
    by name; all others are the model's."""
    targets, method = loss_targets(loss_fn), vars(source).get("forward")
    needed = [target.name for target in targets if target.default is inspect.Parameter.empty]

    def computing(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {target.name: kwargs.pop(target.name) for target in targets if target.name in kwargs}
        output = _called(model, method, args, kwargs)
        told = [given[name] for name in needed if name in given]
        has_none = bool(told) and all(value is None for value in told)
        return output if has_none or not given else loss_fn(output, **given)

    computing.__signature__ = _signature(inspect.signature(source.forward), targets)  # type: ignore[attr-defined]
    return MethodType(computing, source)


def computing_loss(source: nn.Module, loss_fn: LossFn | None) -> AbstractContextManager[None]:
    """Within, the source's own forward returns the loss, if there is a loss function."""
    return nullcontext() if loss_fn is None else having_forward(source, with_loss(source, loss_fn))


def _signature(model: inspect.Signature, targets: list[inspect.Parameter]) -> inspect.Signature:
    """A method's signature: `self`, the model's parameters, and those of the loss, which win if names collide."""
    names = {target.name for target in targets}
    every = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    every += [parameter for parameter in model.parameters.values() if parameter.name not in names]
    for target in targets:
        default = None if target.default is inspect.Parameter.empty else target.default
        every.append(target.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=default))
    return inspect.Signature(sorted(every, key=lambda parameter: parameter.kind))
