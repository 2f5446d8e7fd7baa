"""Free each fetched chunk after its last reader, and reduce its gradients only then.

    before                                   after
    w0 = geminifx.wait(c0, 0)                w0 = geminifx.wait(c0, 0)
    w = geminifx.view(w0, 0, [4, 4])         w = geminifx.view(w0, 0, [4, 4])
    y = aten.mm.default(x, w)                y = aten.mm.default(x, w)
    z = aten.relu.default(y)                 z = aten.relu.default(y)
                                             geminifx.release(w0, 0)
    c1 = geminifx.fetch(1, ...)              c1 = geminifx.fetch(1, ...)

If the next chunk instruction is near, the release moves down to it, so that compute stays in one piece for `cluster`.
If a chunk's gradients are complete while something still reads its weights, their reduce waits for that reader: the
chunk's states then follow in order, COMPUTE, HOLD_AFTER_BACKWARD, READY_FOR_REDUCE.
"""

from torch import fx

from ..runtime.isa.instructions import ACCUMULATE_GRAD, PLACED, REDUCE, RELEASE, TURN, WAIT
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, note
from .program.verify import all_readers, chunked, released

NEAR = 6
"""How many operators a chunk may outlive its last reader by: enough for a residual addition, a dropout and some
views."""


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
    """The node to release in front of: the next instruction if it is near, else the node after `last`."""
    node = last.next
    for _ in range(NEAR):
        if node.op != "call_function" or node.target in PLACED or node.target is TURN:
            return node
        node = node.next
    return last.next
