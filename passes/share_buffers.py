"""Give every rank the buffers of the first one, where the forward writes to them.

    before                                          after (two ranks)
    mean = aten.lerp.Scalar(running_mean, m, 0.1)   mean = aten.lerp.Scalar(running_mean, m, 0.1)
    var = aten.lerp.Scalar(running_var, v, 0.1)     var = aten.lerp.Scalar(running_var, v, 0.1)
                                                    mean_1 = aten.view.default(mean, [-1])
                                                    var_1 = aten.view.default(var, [-1])
                                                    cat = aten.cat.default([mean_1, var_1])
                                                    first = geminifx.broadcast(cat)
                                                    slice = aten.slice.Tensor(first, 0, 0, 4)
                                                    mean_2 = aten.view.default(slice, [4])
                                                    ...
    return {"mutation:mean": mean, ...}             return {"mutation:mean": mean_2, ...}

Each rank computes what it writes, such as running statistics, from its own batch, and ranks that went on with different
buffers would save, and evaluate, different models. As in torch's DistributedDataParallel, the next forward begins with
the first rank's. What this forward computes with is each rank's own. Buffers of one dtype are exchanged at once; what
depends on neither the batch nor random numbers, such as a count of steps, is the same on all ranks as it is. An
evaluation, which may run on some ranks only, exchanges nothing: what it writes stays those ranks' own.
"""

from collections import defaultdict
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx

from ..runtime.isa.instructions import BROADCAST, RECEIVE
from ..runtime.isa.layout import contiguous_stride
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Note, Program, is_random, note, tensor_type
from .program.verify import canonical

aten = torch.ops.aten


@graph_pass(requires=(canonical,))
def share_buffers(program: Program, plan: Plan) -> None:
    if plan.batches == 1 or not program.inputs("tangent"):
        return
    differing = _differing(program)
    written = {name: value for name, value in program.results_of("mutation").items() if value in differing}
    backward = (node for node in program.computes if note(node).phase == "backward")
    end = next(backward, program.output)
    by_dtype = defaultdict[torch.dtype, dict[str, fx.Node]](dict)
    for name, value in written.items():
        by_dtype[tensor_type(value).dtype][name] = value
    results = dict(program.results)
    for values in by_dtype.values():
        results |= {f"mutation:{name}": value for name, value in _of_first(program, values, end).items()}
    program.set_results(results)


def _differing(program: Program) -> set[fx.Node]:
    """The values that depend on the batch or on random numbers."""
    found = {node for node in program.placeholders if note(node).role.startswith(("input:", "number:"))}
    for node in program.computes:
        if node.target is RECEIVE or is_random(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _of_first(program: Program, values: dict[str, fx.Node], end: fx.Node) -> dict[str, fx.Node]:
    """The first rank's values, by name, all of one dtype; they are exchanged in front of `end`."""

    def emit(target: Callable[..., Any], *args: Any, **options: Any) -> fx.Node:
        return program.emit(target, args, options, before=end, like=Note(phase="forward"))

    def flat(value: fx.Node) -> fx.Node:
        type = tensor_type(value)
        if type.stride != contiguous_stride(type.shape):
            value = emit(aten.clone.default, value, memory_format=torch.contiguous_format)
        return emit(aten.view.default, value, [-1])

    parts = [flat(value) for value in values.values()]
    first = emit(BROADCAST, emit(aten.cat.default, parts) if len(parts) > 1 else parts[0])
    found, begin = dict[str, fx.Node](), 0
    for name, value in values.items():
        shape = tensor_type(value).shape
        part = emit(aten.slice.Tensor, first, 0, begin, begin + prod(shape))
        found[name], begin = emit(aten.view.default, part, list(shape)), begin + prod(shape)
    return found
