"""Take parameters out of chunks and put gradients into them.

    before                                  after
    def training(x, w):                     def training(x):
        y = aten.mm.default(x, w)               fetch = geminifx.fetch(0, 64, torch.float32)
                                                wait = geminifx.wait(fetch, 0)
                                                w = geminifx.view(wait, 0, [4, 4])
                                                y = aten.mm.default(x, w)
        dw = aten.mm.default(x2, g)             dw = aten.mm.default(x2, g)
        return {"gradient:w": dw}               gradients = geminifx.gradients(64, torch.float32)
                                                geminifx.put(gradients, 0, dw)
                                                geminifx.reduce(gradients, 0, [0])
                                                geminifx.accumulate_grad(gradients, 0, [0])
                                                return {}

Each phase, or each forward and backward of a round, fetches a chunk once, in front of its first reader. A chunk's
gradients are reduced and accumulated as soon as the last of its slots is filled. Chunks are PatrickStar's idea (Fang et
al., 2021), as used by Gemini.
"""

from collections import defaultdict

from torch import fx

from ..runtime.isa.instructions import ACCUMULATE_GRAD, FETCH, GRADIENTS, PUT, REDUCE, VIEW, WAIT
from ..runtime.isa.layout import ChunkLayout
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, annotate, note
from .program.verify import chunked, turned


@graph_pass(requires=(turned,), gives=(chunked,))
def chunk(program: Program, plan: Plan) -> None:
    _collect_gradients(program, plan)
    for sweep in dict.fromkeys(note(node).sweep for node in program.computes):
        _fetch_parameters(program, plan, sweep)
    for node in program.inputs("parameter").values():
        program.graph.erase_node(node)


def _fetch_parameters(program: Program, plan: Plan, sweep: str) -> None:
    order = program.positions()
    readers: dict[int, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
    for name, parameter in program.inputs("parameter").items():
        layout, _ = plan.layout.places[name]
        for user in parameter.users:
            if note(user).sweep == sweep:
                readers[layout.index].append((user, parameter))
    for index, pairs in readers.items():
        layout = plan.layout.chunks[index]
        first = min((user for user, _ in pairs), key=order.__getitem__)
        fetch = program.emit(FETCH, (index, layout.numel, layout.dtype), before=first)
        wait = program.emit(WAIT, (fetch, index), before=first)
        annotate(fetch, chunk=index)
        annotate(wait, chunk=index)
        for parameter in dict.fromkeys(parameter for _, parameter in pairs):
            users = [user for user, p in pairs if p is parameter]
            _replace_reads(program, plan, parameter, wait, sorted(users, key=order.__getitem__))


def _replace_reads(program: Program, plan: Plan, parameter: fx.Node, wait: fx.Node, users: list[fx.Node]) -> None:
    layout, number = plan.layout.places[note(parameter).role.removeprefix("parameter:")]
    slot = layout.slots[number]
    name = "_".join(slot.name.split(".")[-2:])
    view = program.emit(VIEW, (wait, slot.offset, list(slot.shape)), before=users[0], name=name)
    annotate(view, chunk=layout.index, placement=note(parameter).placement)
    for user in users:
        user.replace_input_with(parameter, view)


def _collect_gradients(program: Program, plan: Plan) -> None:
    order = program.positions()
    complete: dict[int, dict[int, fx.Node]] = defaultdict(dict)
    for name, gradient in program.results_of("gradient").items():
        if name in plan.layout.places:
            layout, number = plan.layout.places[name]
            complete[layout.index][number] = gradient
    for index, gradients in complete.items():
        layout = plan.layout.chunks[index]
        _emit_gradients(program, layout, dict(sorted(gradients.items(), key=lambda item: order[item[1]])))
    program.set_results({
        role: node for role, node in program.results.items()
        if role.removeprefix("gradient:") not in plan.layout.places
    })  # fmt: skip


def _emit_gradients(program: Program, layout: ChunkLayout, gradients: dict[int, fx.Node]) -> None:
    first, *_ = gradients.values()
    *_, last = gradients.values()
    origin = note(first)
    buffer = program.emit(GRADIENTS, (layout.numel, layout.dtype), before=first.next, like=origin)
    annotate(buffer, chunk=layout.index)
    for number, gradient in gradients.items():
        # Put each gradient right after it is computed; the first one right after the buffer is allocated.
        point = buffer.next if gradient is first else gradient.next
        put = (buffer, layout.slots[number].offset, gradient)
        end = program.emit(PUT, put, before=point, like=note(gradient))
    while end.next.target is PUT and end.next.args[0] is buffer:  # one gradient may serve several slots
        end = end.next
    slots = sorted(gradients)
    accumulate = program.emit(ACCUMULATE_GRAD, (buffer, layout.index, slots), before=end.next, like=note(last))
    program.emit(REDUCE, (buffer, layout.index, slots), before=accumulate, like=note(last))
