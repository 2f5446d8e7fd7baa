"""Refuses torch.autograd.grad and backward(inputs=...) on parameters: a compiled step computes all gradients.

A step has no edges to the parameters in autograd's graph, as they would cost microseconds each in every step. Without
them autograd finds no gradient, and with `inputs=` it does not even report that.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from .executor import Step, TrainingRun
from .isa.errors import StateError
from .isa.torch_private import watch_chosen_inputs


@cache
def refuse_them() -> None:
    """Hooks the check into autograd, for the rest of this process."""
    watch_chosen_inputs(_check)


def _check(outputs: Sequence[Any], inputs: Sequence[Any]) -> None:
    """Raises StateError if any of the chosen inputs is a parameter of a step that `outputs` come from."""
    asked = {id(each) for each in inputs if isinstance(each, Tensor) and each.is_leaf}
    for run in _runs(outputs) if asked else ():
        names = run.executor.machine.store.chunks.names
        name = next((names[identity] for identity in asked if identity in names), None)
        if name is not None:
            raise StateError(
                f"torch.autograd.grad(...) or backward(inputs=...) was called for parameter {name}, but a compiled "
                "step computes the gradients of all parameters and adds them to .grad. Call loss.backward() and read "
                "parameter.grad, after zero_grad() if it should hold the gradient of this loss only; freeze "
                "parameters that should get none, with parameter.requires_grad_(False)"
            )


def _runs(outputs: Sequence[Any]) -> Iterator[TrainingRun]:
    """Yields the training steps in the autograd graph of `outputs`."""
    found: set[Node] = set()
    ahead = [each.grad_fn if isinstance(each, Tensor) else each.node for each in outputs]
    while ahead:
        node = ahead.pop()
        if node is None or node in found:
            continue
        found.add(node)
        ahead.extend(following for following, _ in node.next_functions)
        if isinstance(node, Step._backward_cls):
            yield node.run
