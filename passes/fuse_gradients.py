"""Multiply a weight's gradient directly into its chunk.

    before                                               after
    dw = aten.mm.default(t, x)                           gradients = geminifx.gradients(64, torch.float32)
    gradients = geminifx.gradients(64, torch.float32)    geminifx.put_mm(gradients, 0, t, x)
    geminifx.put(gradients, 0, dw)

This saves a temporary and a copy. Gradients that are not matrix products, that something else reads, or whose dtype is
not their chunk's are put as before.
"""

import torch
from torch import fx

from ..runtime.isa.instructions import PUT, PUT_MM
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, note, tensor_type
from .program.verify import chunked

MM = torch.ops.aten.mm.default


@graph_pass(requires=(chunked,))
def fuse_gradients(program: Program, plan: Plan) -> None:
    for put in program.calls(PUT):
        buffer, offset, gradient = put.args
        if _is_for_this_alone(gradient) and tensor_type(gradient).dtype == tensor_type(buffer).dtype:
            program.emit(PUT_MM, (buffer, offset, *gradient.args), before=put, like=note(put))
            program.graph.erase_node(put)
            program.graph.erase_node(gradient)


def _is_for_this_alone(gradient: fx.Node) -> bool:
    return gradient.target is MM and len(gradient.users) == 1
