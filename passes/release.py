"""Free each fetched chunk after its last reader, and reduce its gradients only then.

    before                                   after
    w0 = geminifx.wait(c0, 0)                w0 = geminifx.wait(c0, 0)
    w = geminifx.view(w0, 0, [4, 4])         w = geminifx.view(w0, 0, [4, 4])
    y = aten.mm.default(x, w)                y = aten.mm.default(x, w)
    z = aten.relu.default(y)                 z = aten.relu.default(y)
                                             geminifx.release(w0, 0)
    c1 = geminifx.fetch(1, ...)              c1 = geminifx.fetch(1, ...)

Where the next chunk instruction is near, the release stands in front of that, so that compute stays in one
piece for `cluster`. A chunk whose gradients are complete while something still reads its weights is reduced
after that reader: its states then pass in order, COMPUTE, HOLD_AFTER_BACKWARD, READY_FOR_REDUCE.
"""

from torch import fx

from ..runtime.isa.instructions import ACCUMULATE_GRAD, PLACED, REDUCE, RELEASE, TURN, WAIT
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, note
from .program.verify import all_readers, chunked, released

NEAR = 8
"""How many operators a chunk may outlive its last reader by: a residual addition, a dropout, some views."""


@graph_pass(requires=(chunked,), gives=(released,))
def release(program: Program, plan: Plan) -> None:
    order = program.positions()
    reduces = {node.args[1]: node for node in program.calls(REDUCE)}
    accumulates = {node.args[1]: node for node in program.calls(ACCUMULATE_GRAD)}
    for wait in program.calls(WAIT):
        last = max(all_readers(wait), key=order.__getitem__)
        chunk = wait.args[1]
        node = program.emit(RELEASE, (wait, chunk), before=_next_instruction(last), like=note(last))
        reduce = reduces.get(chunk)
        if note(wait).phase == "backward" and reduce is not None and order[reduce] < order[last]:
            node.append(reduce)
            if order[accumulates[chunk]] < order[last]:
                reduce.append(accumulates[chunk])


def _next_instruction(last: fx.Node) -> fx.Node:
    """The node to release in front of: the next instruction if it is near, else what follows `last`."""
    node = last.next
    for _ in range(NEAR):
        if node.op != "call_function" or node.target in PLACED or node.target is TURN:
            return node
        node = node.next
    return last.next
