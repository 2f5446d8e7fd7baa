"""Turn the compute between chunk instructions into functions that equal segments share.

    before                                       after
    w0 = geminifx.wait(c0, 0)                    def layers_forward(x, w): ...
    q = geminifx.view(w0, 0, [4, 4])
    y = aten.mm.default(x, q)                    w0 = geminifx.wait(c0, 0)
    geminifx.release(w0, 0)                      box = [x, w0]
    w1 = geminifx.wait(c1, 1)                    results = layers_forward(box)
    q_1 = geminifx.view(w1, 0, [4, 4])           y = results[0]
    y_1 = aten.mm.default(y, q_1)                geminifx.release(w0, 0)
    geminifx.release(w1, 1)                      ... the same with w1 ...

A model of many equal layers then reads as one function per kind of segment and a short main program. Operators keep
their order, and values inside a function die where they died before.
"""

import operator

from torch import fx

from ..runtime.isa.instructions import PLACED, TURN
from .program.manager import graph_pass
from .program.outline import Segment, outline
from .program.plan import Plan
from .program.program import Program, note
from .program.verify import offloaded, overlapped, released

SHORTEST = 4
"""Shorter segments, in operators, stay inline: a call would be harder to read."""


@graph_pass(requires=(released,), breaks=(overlapped, offloaded))  # what starts in one function may end in another
def cluster(program: Program, plan: Plan) -> None:
    outline(program, _segments(program))


def _segments(program: Program) -> list[Segment]:
    found, current = list[Segment](), list[fx.Node]()
    for node in [*program.computes, None]:
        inside = node is not None and node.target not in PLACED and not _at_turn(node)
        if current and not (inside and note(node).action == note(current[-1]).action):
            found.append(Segment(tuple(current)))
            current = []
        if inside:
            current.append(node)
    return [segment for segment in found if len(segment.nodes) >= SHORTEST]


def _at_turn(node: fx.Node) -> bool:
    return node.target is TURN or (node.target is operator.getitem and node.args[0].target is TURN)
