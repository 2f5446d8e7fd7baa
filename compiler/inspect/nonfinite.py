"""Finds where a program's values stop being finite."""

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...passes.program.program import Program, note
from ...runtime.executor import Executor
from ...runtime.isa.instructions import NAMESPACE, OFFLOAD, START_RECEIVE, STARTS, TURN, VIEW
from ...runtime.memory.state_store import Run

_UNDER_WAY = STARTS | {OFFLOAD, START_RECEIVE}
"""Operators that return before their results have arrived."""


def first_nonfinite(program: Program, executor: Executor, inputs: list[Any]) -> str | None:
    """Runs the forward of a lowered program node by node, checking each value.

    Returns "module (operator)" for the first operator that makes an infinite or NaN value, "input <name>" or "parameter
    <name>" for an input or a parameter with such values, or None. An operator counts only if it reads other values and
    all of them are finite, numbers too, so neither making a mask of infinities nor filling or adding one counts. The
    search needs the memory of a step's forward: first release the loss of the step in question, which keeps that step's
    activations.

    Raises BudgetError where the device has less memory left.
    """
    pairs = zip(executor.code.inputs, inputs, strict=True)
    read_only = sum(value.nbytes for role, value in pairs if isinstance(value, Tensor) and not _is_buffer(role))
    with executor.resume(Run(), read_only), torch.random.fork_rng():
        try:
            return _search(program, executor, iter(inputs))
        finally:
            executor.machine.abort()  # the search ends in the middle of the program


def _search(program: Program, executor: Executor, arguments: Iterator[Any]) -> str | None:
    values: dict[fx.Node, object] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            # The forward may write to its buffers; a search must not.
            argument = next(arguments)
            values[node] = argument.clone() if _is_buffer(note(node).role) else argument
            if not _finite(values[node]):
                return f"input {node.name}"
            continue
        if node.op == "output" or node.target is TURN:
            return None
        values[node] = _run(node, values, executor)
        if node.target is VIEW and not _finite(values[node]):
            return f"parameter {_parameter(node, executor)}"
        has_come = node.all_input_nodes and node.target not in _UNDER_WAY
        if has_come and not _finite(values[node]) and _from_finite(node, values):
            operation = str(node.target).removesuffix(".default")
            return f"{note(node).module or 'the model'} ({operation})"
        _forget(node, values)
    return None


def _is_buffer(role: str) -> bool:
    return role.startswith("buffer:")


def _run(node: fx.Node, values: dict[fx.Node, object], executor: Executor) -> object:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    kwargs = {k: executor.machine.device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
    if node.target is operator.getitem:
        return args[0][args[1]]
    name = str(node.target)
    if node.op == "call_module":
        return executor.loaded.world[name](*args)
    if name.startswith(NAMESPACE + "."):
        return getattr(executor.called, name.split(".")[1])(*args, **kwargs)
    return node.target(*args, **kwargs)


def _parameter(view: fx.Node, executor: Executor) -> str:
    """The name of the parameter that a view reads from its chunk."""
    wait, offset, shape = view.args
    slots = executor.machine.chunks[wait.args[1]].layout.slots
    return next(slot.name for slot in slots if slot.offset == offset and slot.shape == tuple(shape))


def _from_finite(node: fx.Node, values: dict[fx.Node, object]) -> bool:
    numbers = (value for value in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(value, float))
    return all(map(math.isfinite, numbers)) and all(_finite(values[value]) for value in node.all_input_nodes)


def _finite(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    if isinstance(value, float):
        return math.isfinite(value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return True
    # One number, which is infinite or NaN where any element is. torch.isfinite would make three tensors of the value's
    # size beside a step that fills the budget.
    return math.isfinite(torch.linalg.vector_norm(value, math.inf).item())


def _forget(node: fx.Node, values: dict[fx.Node, object]) -> None:
    """Drops values that this node was the last to read, so that the search stays within the step's own memory."""
    for value in node.all_input_nodes:
        if all(user in values for user in value.users):
            values[value] = None
