"""Dequantise weights again in each later sweep that reads them, instead of keeping them.

    before                                               after
    w = geminifx.dequantize(codes, scales, "nf4", ...)   w = geminifx.dequantize(codes, scales, "nf4", ...)
    t = aten.t.default(w)                                t = aten.t.default(w)
    y = aten.mm.default(x, t)                            y = aten.mm.default(x, t)
    turn = yield [y], [0]                                turn = yield [y], [0]
    tangent = turn[0]                                    tangent = turn[0]
                                                         w_1 = geminifx.dequantize(codes, scales, "nf4", ...)
                                                         t_1 = aten.t.default(w_1)
    dx = aten.mm.default(tangent, t)                     dx = aten.mm.default(tangent, t_1)

Between forward and backward only the codes exist; like any weight, they are fetched a second time. In a recomputed
block, the recomputation and the backward share one dequantisation.
"""

from collections import defaultdict

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
        seen, readers = _with_views(weight), defaultdict[str, list[fx.Node]](list)
        for reader in sorted({user for value in seen for user in value.users} - seen, key=order.__getitem__):
            if note(reader).sweep != note(weight).sweep:
                readers[note(reader).sweep].append(reader)
        for first, *others in readers.values():
            copies = dict[fx.Node, fx.Node]()
            for reader in (first, *others):
                for value in seen.intersection(reader.all_input_nodes):
                    reader.replace_input_with(value, program.view_again(value, seen, copies, before=first))
    program.eliminate_dead_code()


def _with_views(weight: fx.Node) -> set[fx.Node]:
    """The weight and the values of its sweep that share its storage."""
    found, waiting = {weight}, [weight]
    while waiting:
        value = waiting.pop()
        for user in value.users:
            is_near = note(user).sweep == note(weight).sweep
            if user not in found and is_near and value in aliased_inputs(user):
                found.add(user)
                waiting.append(user)
    return found
