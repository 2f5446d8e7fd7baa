"""Start a pipeline's receives early and wait for them where they are read, so that messages overlap with compute.

    before                                             after
    # forward F1.0: layers.1                           # forward F1.0: layers.1
                                                       p = geminifx.start_receive([2, 4], [4, 1], torch.float32, 0)
    y = aten.mm.default(h, w)                          y = aten.mm.default(h, w)
    # forward F1.1: layers.1                           # forward F1.1: layers.1
    h_1 = geminifx.receive([2, 4], [4, 1], ..., 0)     h_1 = geminifx.finish_receive(p)
    y_1 = aten.mm.default(h_1, w)                      y_1 = aten.mm.default(h_1, w)

A receive starts where the action before its reader's begins, and no earlier, to keep its buffer short-lived; behind the
last action, where sums of gradients come that are long, each starts where the one before it is awaited. Receives from
one rank stay in order. None crosses the turn: a step that never runs backward must not wait for a message that
nobody sends. No send moves later and no wait moves earlier, so the pass cannot introduce a deadlock.
"""

from torch import fx

from ..runtime.isa.instructions import FINISH_RECEIVE, RECEIVE, START_RECEIVE
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, annotate, note
from .program.verify import posted, turned


@graph_pass(requires=(turned,), gives=(posted,))
def post_receives(program: Program, plan: Plan) -> None:
    if not program.calls(RECEIVE):
        return
    point = begin = program.output  # where the previous action and the current one begin
    now = None
    for node in program.computes:
        phase, action = note(node).phase, note(node).action
        if (phase, action) != now:
            point, begin = begin if now is not None and now[0] == phase else node, node
            now = phase, action
        if node.target is RECEIVE:
            finish = _post(program, node, point)
            point, begin = (finish if place is node else place for place in (point, begin))
            is_behind = phase == "backward" and not action
            point = finish if is_behind else point


def _post(program: Program, receive: fx.Node, point: fx.Node) -> fx.Node:
    start = program.emit(START_RECEIVE, receive.args, before=point, like=note(receive))
    annotate(start, action=note(point).action)
    finish = program.emit(FINISH_RECEIVE, (start,), before=receive, like=note(receive), name=receive.name)
    program.replace(receive, finish)
    return finish
