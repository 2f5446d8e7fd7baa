"""Dequantise weights again behind the turn, where the backward reads them.

    before                                               after
    w = geminifx.dequantize(codes, scales, "nf4", ...)   w = geminifx.dequantize(codes, scales, "nf4", ...)
    t = aten.t.default(w)                                t = aten.t.default(w)
    y = aten.mm.default(x, t)                            y = aten.mm.default(x, t)
    turn = yield [y], [0]                                turn = yield [y], [0]
    tangent = turn[0]                                    tangent = turn[0]
                                                         w_1 = geminifx.dequantize(codes, scales, "nf4", ...)
                                                         t_1 = aten.t.default(w_1)
    dx = aten.mm.default(tangent, t)                     dx = aten.mm.default(tangent, t_1)

Between forward and backward there are codes alone, which are fetched a second time as any weight is. What a block that
is recomputed reads is dequantised for its recomputation and its backward together.
"""

from torch import fx

from ..runtime.isa.quantized import DEQUANTIZE
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, aliased_inputs, note
from .program.verify import turned


@graph_pass(requires=(turned,), gives=(turned,))
def dequantize(program: Program, plan: Plan) -> None:
    order = program.positions()
    for weight in program.calls(DEQUANTIZE):
        if note(weight).phase != "forward":
            continue
        seen, copies = _with_views(weight), dict[fx.Node, fx.Node]()
        readers = {user for value in seen for user in value.users if note(user).phase == "backward"}
        first = min(readers, key=order.__getitem__, default=None)
        for reader in sorted(readers, key=order.__getitem__):
            assert first is not None
            for value in seen.intersection(reader.all_input_nodes):
                reader.replace_input_with(value, program.view_again(value, seen, copies, before=first))
    program.eliminate_dead_code()


def _with_views(weight: fx.Node) -> set[fx.Node]:
    """The forward's values that lie in the weight's memory."""
    found, waiting = {weight}, [weight]
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if user not in found and note(user).phase == "forward" and value in aliased_inputs(user):
                found.add(user)
                waiting.append(user)
    return found
