"""Roles: what the inputs and results of a traced step mean to the model; its program refers to them by role."""

from typing import Any

from ...runtime.isa import torch_private as private
from ...runtime.isa.errors import CaptureError

_PREFIX = "model."
"""The traced module is ours and holds the model as `model`."""


def input_role(description: Any, names: list[str], leaves: list[int]) -> tuple[str, str]:
    """The role and name of an input. `names` and `leaves` are the names and positions of the tensor arguments."""
    match description:
        case private.ParamAOTInput(target=target):
            return f"parameter:{without_prefix(target)}", without_prefix(target)
        case private.BufferAOTInput(target=target):
            return f"buffer:{without_prefix(target)}", without_prefix(target)
        case private.PlainAOTInput(idx=i):
            return f"input:{leaves[i]}", names[i]
        case private.TangentAOTInput(output=private.PlainAOTOutput(idx=i)):
            return f"tangent:{i}", f"tangent_{i}"
        case private.TangentAOTInput(output=private.InputMutationAOTOutput(mutated_input=written)):
            raise _written(written, names, leaves)
    raise CaptureError(
        f"the model's input {description} is of a type that cannot be captured; expected tensors, numbers, strings or "
        "None"
    )


def result_role(description: Any, names: list[str], leaves: list[int]) -> str:
    """The role of a result. Raises CaptureError if the forward writes to anything but a buffer."""
    match description:
        case private.PlainAOTOutput(idx=i):
            return f"output:{i}"
        case private.GradAOTOutput(grad_of=private.ParamAOTInput(target=target)):
            return f"gradient:{without_prefix(target)}"
        case private.GradAOTOutput(grad_of=private.PlainAOTInput(idx=i)):
            return f"gradient:input:{leaves[i]}"
        case private.InputMutationAOTOutput(mutated_input=private.BufferAOTInput(target=target)):
            return f"mutation:{without_prefix(target)}"
        case private.InputMutationAOTOutput(mutated_input=written):
            raise _written(written, names, leaves)
    raise CaptureError(
        f"the model's result {description} is of a type that cannot be captured; expected tensors, numbers, strings "
        "or None"
    )


def _written(description: Any, names: list[str], leaves: list[int]) -> CaptureError:
    _, name = input_role(description, names, leaves)
    return CaptureError(
        f"the model writes to {name} in its forward; expected writes to buffers only. Keep averages and counts in "
        "buffers, or write to the parameter outside the forward, with parameter.data.copy_()"
    )


def without_prefix(name: str) -> str:
    """The name of a module or parameter within the model."""
    return "" if name == "model" else name.removeprefix(_PREFIX)
