"""Divide the step into forward and backward at one instruction, the turn.

    before                                       after
    def training(x, w, tangent):                 def training(x, w):
        t = aten.t.default(w)                        t = aten.t.default(w)
        y = aten.mm.default(x, t)                    y = aten.mm.default(x, t)
                                                     turn = yield [y], [0]
                                                     tangent = turn[0]
                                                     t_1 = aten.t.default(w)
        dx = aten.mm.default(tangent, t)             dx = aten.mm.default(tangent, t_1)
        return {"output:0": y, ...}                  return {...}

The program stays in one piece. It runs as a generator that stops at the turn, and the saved activations are its local
variables: each is freed as the backward consumes it. Views of parameters are made again after the turn, and in each
sweep of a round, so that no weight has to stay on the device for the backward. Buffers that the forward changes are
written back before the turn; a backward that reads the old value reads a copy.
"""

import operator

import torch
from torch import fx

from ..runtime.isa.instructions import TURN
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Note, Program, aliased_inputs, annotate, note, type_of
from .program.verify import canonical, turned


@graph_pass(requires=(canonical,), gives=(turned,))
def partition(program: Program, plan: Plan) -> None:
    backward = [node for node in program.computes if note(node).phase == "backward"]
    boundary = backward[0] if backward else program.output
    _write_buffers(program, boundary)
    if program.inputs("tangent"):
        _insert_turn(program, boundary)
        _remake_parameter_views(program)
    program.eliminate_dead_code()


def _write_buffers(program: Program, boundary: fx.Node) -> None:
    """Write the forward's new buffer values in place, in front of `boundary`, the first backward node."""
    buffers, results = program.inputs("buffer"), dict(program.results)
    written = {buffers[name]: results.pop(f"mutation:{name}") for name in program.results_of("mutation")}
    program.set_results(results)
    copies: dict[fx.Node, fx.Node] = {}
    for buffer in written:
        copies |= _keep_old_value(program, buffer, boundary, frozenset(written.values()))
    for buffer, value in written.items():
        source = copies.get(value, value)
        program.emit(torch.ops.aten.copy_.default, (buffer, source), before=boundary, like=_forward(buffer))


def _keep_old_value(program: Program, buffer: fx.Node, boundary: fx.Node,
                    kept: frozenset[fx.Node]) -> dict[fx.Node, fx.Node]:  # fmt: skip
    """Let readers after the write of a buffer read a copy made before it, also those that read it through views.

    The readers are the backward, the results, and the writes themselves if they write a value that is in `kept`.
    Returns the copies: that of the buffer, and the same views of it, which keep the strides that their readers expect.
    """
    late = {node for node in program.computes if note(node).phase == "backward"} | {program.output}
    views = _forward_views(program, {buffer})
    seen = [value for value in (buffer, *views) if value in kept or not late.isdisjoint(value.users)]
    if not seen:
        return {}
    clone = program.emit(torch.ops.aten.clone.default, (buffer,), before=boundary, like=_forward(buffer))
    copies = {buffer: clone}
    for view in views:
        copies[view] = program.copy_node(view, lambda value: copies.get(value, value), before=boundary)
    for value in seen:
        for user in late.intersection(value.users):
            user.replace_input_with(value, copies[value])
    return copies


def _forward_views(program: Program, of: set[fx.Node]) -> list[fx.Node]:
    """The forward's values that share storage with one of `of`, in program order."""
    views: dict[fx.Node, None] = {}
    for node in program.computes:
        if note(node).phase == "forward" and any(v in of or v in views for v in aliased_inputs(node)):
            views[node] = None
    return list(views)


def _forward(node: fx.Node) -> Note:
    annotate(node, phase="forward")
    return note(node)


def _insert_turn(program: Program, boundary: fx.Node) -> None:
    """Return the outputs at the turn, in front of `boundary`, and take the tangents from it."""
    outputs = list(program.results_of("output").values())
    differentiable = sorted(map(int, program.inputs("tangent")))
    turn = program.emit(TURN, (outputs, differentiable), before=boundary, like=_forward(program.placeholders[0]))
    for position, tangent in program.inputs("tangent").items():
        index = differentiable.index(int(position))
        value = program.emit(operator.getitem, (turn, index), before=boundary, name=tangent.name)
        annotate(value, phase="backward", module="")
        if type_of(value) != type_of(tangent):  # torch 2.11 traces it for a contiguous tangent
            options = {"memory_format": torch.contiguous_format}
            value = program.emit(torch.ops.aten.clone.default, (value,), options, before=boundary, like=note(value))
        program.replace(tangent, value)
    kept = {role: node for role, node in program.results.items() if not role.startswith("output:")}
    program.set_results(kept)


def _remake_parameter_views(program: Program) -> None:
    """Make views of parameters again for readers in other sweeps."""
    views = set(_forward_views(program, set(program.inputs("parameter").values())))
    for reader in program.computes:
        copies: dict[fx.Node, fx.Node] = {}
        for value in reader.all_input_nodes:
            if value in views and note(value).sweep != note(reader).sweep:
                reader.replace_input_with(value, program.view_again(value, views, copies, before=reader))
