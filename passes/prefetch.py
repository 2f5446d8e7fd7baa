"""Start copies early and wait for them late, so that they overlap with compute.

    before (two chunks)                      after, one chunk ahead
    c0 = geminifx.fetch(0, ...)              c0 = geminifx.fetch(0, ...)
    w0 = geminifx.wait(c0, 0)                   w0 = geminifx.wait(c0, 0)
    y = aten.mm.default(x, ...)              c1 = geminifx.fetch(1, ...)
    c1 = geminifx.fetch(1, ...)              y = aten.mm.default(x, ...)
    w1 = geminifx.wait(c1, 1)                   w1 = geminifx.wait(c1, 1)

In the other direction, a chunk's gradients are accumulated once the next chunk's are complete, so that they travel
while those are computed. Copies never cross the turn: a step that never runs backward must not leave a copy behind.
"""

from ..runtime.isa.instructions import ACCUMULATE_GRAD, FETCH, REDUCE, WAIT
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, note
from .program.verify import chunked


@graph_pass(requires=(chunked,))
def prefetch(program: Program, plan: Plan) -> None:
    if plan.prefetch == 0:
        return
    for phase in ("forward", "backward"):
        points = [node for node in program.calls(WAIT) if note(node).phase == phase]
        fetches = [node for node in program.calls(FETCH) if note(node).phase == phase]
        for number, fetch in enumerate(fetches[1:], start=1):
            at = max(0, number - plan.prefetch)
            points[at].append(fetch)
            points[at] = fetch  # copies that start at the same point start in the order of use
    for accumulate, following in zip(program.calls(ACCUMULATE_GRAD), program.calls(REDUCE)[1:], strict=False):
        following.prepend(accumulate)
