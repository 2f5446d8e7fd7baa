"""Checks that the arguments of the package's functions are of the kinds they take, before anything is done."""

import inspect
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..runtime.isa.errors import ArgumentError, GeminiError, wrong_argument
from .module import CompiledModule


def check_compiled(model: Any) -> None:
    """Raises ArgumentError for anything but a compiled model."""
    if not isinstance(model, CompiledModule):
        raise wrong_argument("model", model, "a model returned by geminifx.compile")


def check_optimizer(model: CompiledModule, optimizer: Any) -> None:
    """Raises ArgumentError for anything but an optimizer over parameters of the model."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise wrong_argument(
            "optimizer", optimizer, "the optimizer returned by model.optimizer(...), a torch optimizer, or None"
        )
    known = set(model.session.names())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise ArgumentError(
                    f"optimizer: its parameter of shape {tuple(parameter.shape)} does not belong to the model; "
                    "expected the optimizer returned by model.optimizer(...), or a torch optimizer over "
                    "model.parameters()"
                )


def check_call(model: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[Any, Any]) -> None:
    """Raises ArgumentError for example inputs that do not match the signature of the model's forward."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"example_inputs: {error}; expected the arguments of {type(model.source).__name__}.forward{signature}"
        ) from None


def forward_failure(error: Exception, model: nn.Module) -> ArgumentError | None:
    """The ArgumentError to raise for an error from the model's forward while it was captured with example inputs;
    None if the error is one of ours or did not pass through that forward."""
    forward = getattr(inspect.unwrap(model.forward), "__code__", None)
    if isinstance(error, GeminiError) or all(code is not forward for code in _codes(error.__traceback__)):
        return None
    failure = ArgumentError(
        f"example_inputs: {type(model).__name__}.forward raised {type(error).__name__} with them: {error}; expected "
        "the arguments of a training step"
    )
    for note in getattr(error, "__notes__", ()):  # such as what of the model may be at fault instead
        failure.add_note(note)
    return failure


def _codes(traceback: TracebackType | None) -> Iterator[Any]:
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next
