"""Compute gradients of weights and biases right in their chunk.

    before                                               after
    dw = aten.mm.default(t, x)                           gradients = geminifx.gradients(192, torch.float32)
    gradients = geminifx.gradients(192, torch.float32)   geminifx.put_mm(gradients, 0, t, x)
    geminifx.put(gradients, 0, dw)                       geminifx.put_sum(gradients, 64, dy, [0])
    sum_1 = aten.sum.dim_IntList(dy, [0], True)
    db = aten.view.default(sum_1, [64])
    geminifx.put(gradients, 64, db)

This saves a temporary and a copy. Gradients that are neither matrix products nor sums, that something else reads, or
whose dtype is not their chunk's are put as before; so are sums where Inductor makes them part of its kernels.
"""

from typing import Any

import torch
from torch import fx

from ..runtime.isa.instructions import PUT, PUT_MM, PUT_SUM
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, note, tensor_type
from .program.verify import chunked

MM, SUM, VIEW = torch.ops.aten.mm.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.view.default


@graph_pass(requires=(chunked,))
def fuse_gradients(program: Program, plan: Plan) -> None:
    for put in program.calls(PUT):
        buffer, offset, gradient = put.args
        found = _in_place(gradient, keeps_sums=plan.request.kernels == "fused")
        if found is None or tensor_type(gradient).dtype != tensor_type(buffer).dtype:
            continue
        target, args, temporaries = found
        program.emit(target, (buffer, offset, *args), before=put, like=note(put))
        program.graph.erase_node(put)
        for node in temporaries:
            program.graph.erase_node(node)


def _in_place(gradient: fx.Node, keeps_sums: bool) -> tuple[Any, tuple[Any, ...], list[fx.Node]] | None:
    """The instruction that puts this gradient without temporaries, its last arguments, and the temporaries, the last
    first; None if there is none."""
    if len(gradient.users) > 1:
        return None
    if gradient.target is MM:
        return PUT_MM, gradient.args, [gradient]
    source = gradient.args[0] if gradient.target is VIEW else gradient
    if keeps_sums or source.target is not SUM or len(source.users) > 1 or source.kwargs:
        return None
    terms, dims = source.args[:2]
    type = tensor_type(terms)
    if type.dtype != tensor_type(source).dtype or not dims or not type.shape:
        return None
    summed = [dim % len(type.shape) for dim in dims]
    return PUT_SUM, (terms, summed), list(dict.fromkeys((gradient, source)))
