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
                f"the gradient of parameter {name} was asked for by torch.autograd.grad(...) or backward(inputs=...), "
                "and a compiled step brings those of all parameters, in .grad. Call loss.backward() and read "
                "parameter.grad, with zero_grad() before it where that is to be of this loss alone; what is to get "
                "none can be frozen, by parameter.requires_grad_(False)"
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
