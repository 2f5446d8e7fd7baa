"""Find where a program's values stop being finite."""

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ..passes.program import Program, note
from ..runtime.executor import Executor
from ..runtime.machine import Run
from ..runtime.ops import NAMESPACE, TURN


def first_nonfinite(program: Program, executor: Executor, inputs: list[Tensor]) -> str | None:
    """Run the forward of a lowered program node by node, looking at each value.

    Returns "module (operator)" for the first operator that makes an infinite or NaN value, "input <name>" for
    an input that has one, or None. Operators that make infinities on purpose (masks) are passed over: only
    values that come of finite arguments alone count.
    """
    with executor.resume(Run(), 0), torch.random.fork_rng():
        try:
            return _search(program, executor, iter(inputs))
        finally:
            executor.machine.abort()  # the search ends in the middle of the program


def _search(program: Program, executor: Executor, arguments: Iterator[Tensor]) -> str | None:
    values: dict[fx.Node, object] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            # The forward may write to its buffers; a search must not.
            values[node] = next(arguments).clone()
            if not _finite(values[node]):
                return f"input {node.name}"
            continue
        if node.op == "output" or node.target is TURN:
            return None
        values[node] = _run(node, values, executor)
        if node.all_input_nodes and not _finite(values[node]) and _from_finite(node, values):
            operation = str(node.target).removesuffix(".default")
            return f"{note(node).module or 'the model'} ({operation})"
        _forget(node, values)
    return None


def _run(node: fx.Node, values: dict[fx.Node, object], executor: Executor) -> object:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    kwargs = {k: executor.machine.device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
    if node.target is operator.getitem:
        return args[0][args[1]]
    name = str(node.target)
    if name.startswith(NAMESPACE + "."):
        return getattr(executor.machine, name.split(".")[1])(*args, **kwargs)
    return node.target(*args, **kwargs)


def _from_finite(node: fx.Node, values: dict[fx.Node, object]) -> bool:
    return all(_finite(values[value]) for value in node.all_input_nodes)


def _finite(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())


def _forget(node: fx.Node, values: dict[fx.Node, object]) -> None:
    """Drop what this node was the last to read, so that the search keeps to the step's own memory."""
    for value in node.all_input_nodes:
        if all(user in values for user in value.users):
            values[value] = None
