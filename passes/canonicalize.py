"""Remove what capture leaves behind: no-ops, needless copies and views, common subexpressions, dead code, and second
inputs of shared parameters.

    before                                             after
    w2 = input, tied to w                              (gone)
    a = aten.t.default(w)                              a = aten.t.default(w)
    b = aten.detach.default(a)
    c = aten.t.default(w)                              y = aten.mm.default(x, a)
    y = aten.mm.default(x, c)                          add = aten.add.Tensor(dw, dw2)
    h = aten.view.default(y, [1, 4, 8])                h2 = aten.view.default(y, [4, 2, 4])
    h1 = aten.clone.default(h)
    h2 = aten.view.default(h1, [4, 2, 4])
    return {"gradient:w": dw, "gradient:w2": dw2}      return {"gradient:w": add}

Numerics do not change: a shared parameter's gradient is the same sum that eager autograd computes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, aliased_inputs, is_random, note, tensor_type, type_of, writes
from .program.types import TensorType, freeze
from .program.verify import NO_OPS, canonical

TRANSPOSE, CLONE, VIEW = torch.ops.aten.t.default, torch.ops.aten.clone.default, torch.ops.aten.view.default


@graph_pass(gives=(canonical,))
def canonicalize(program: Program, plan: Plan) -> None:
    for node in program.nodes:
        if node.target in NO_OPS:
            program.replace(node, node.args[0])
        elif node.target is TRANSPOSE and node.args[0].target is TRANSPOSE:
            program.replace(node, node.args[0].args[0])
        elif node.target is CLONE and _copies_what_nobody_else_reads(node):
            program.replace(node, node.args[0])
        elif node.target is VIEW and _is_view_of_view(node):
            inner, shape = node.args
            direct = program.emit(VIEW, (inner.args[0], shape), before=node, like=note(node))
            if type_of(direct) == type_of(node):
                program.replace(node, direct)
                program.graph.erase_node(inner)
            else:
                program.graph.erase_node(direct)
    _merge_tied(program)
    _merge_repeated(program)
    program.eliminate_dead_code()


def _copies_what_nobody_else_reads(clone: fx.Node) -> bool:
    """Whether all of the memory that is copied was made for this copy alone, as where dropout is 0. What a copy of a
    part is made of may be freed."""
    value = whole = clone.args[0]
    if type_of(value) != type_of(clone):
        return False
    while value.op == "call_function" and len(value.users) == 1:
        if isinstance(type_of(value), TensorType):  # and not a tuple of results, each of a memory of its own
            whole = value
        aliased = [*aliased_inputs(value)]
        if not aliased:
            return tensor_type(whole).num_bytes == tensor_type(clone).num_bytes
        if len(aliased) > 1:
            return False
        value = aliased[0]
    return False


def _is_view_of_view(view: fx.Node) -> bool:
    """Whether a view is the only reader of another one, of the same module or one right inside the other. What passes
    between blocks keeps its shape: blocks that are alike stay so."""
    inner = view.args[0]
    if inner.target is not VIEW or len(inner.users) > 1 or note(inner).phase != note(view).phase:
        return False
    module, other = note(view).module, note(inner).module
    return module == other or module == other.rpartition(".")[0] or other == module.rpartition(".")[0]


def _merge_tied(program: Program) -> None:
    """Read shared parameters through their first input only, and add up the gradients of all their inputs."""
    parameters, results = program.inputs("parameter"), dict(program.results)
    for name, node in parameters.items():
        first = note(node).tied
        if not first:
            continue
        program.replace(node, parameters[first])
        partial, other = results.pop(f"gradient:{name}", None), results.get(f"gradient:{first}")
        if partial is not None and other is not None:
            partial = program.emit(torch.ops.aten.add.Tensor, (other, partial), before=program.output,
                                   like=note(partial))  # fmt: skip
        if partial is not None:
            results[f"gradient:{first}"] = partial
    program.set_results(results)


def _merge_repeated(program: Program) -> None:
    """Eliminate common subexpressions within each phase; merging across phases would keep activations alive. Outputs
    and what they are views of stay separate: if two of them shared memory, a caller that changes one would change the
    other, or what the backward reads."""
    seen: dict[Any, fx.Node] = {}
    handed_out = _with_bases(value for role, value in program.results.items() if not role.startswith("gradient:"))
    for node in program.computes:
        if node.op != "call_function" or writes(node) or is_random(node) or node in handed_out:
            continue
        arguments = freeze((node.args, node.kwargs), node=lambda value: value)
        key = (node.target, arguments, note(node).phase)
        first = seen.setdefault(key, node)
        if first is not node:
            program.replace(node, first)


def _with_bases(values: Iterable[fx.Node]) -> set[fx.Node]:
    """The values, and all others whose memory they may share."""
    found, reached = set[fx.Node](), list(values)
    while reached:
        value = reached.pop()
        if value not in found:
            found.add(value)
            reached += aliased_inputs(value)
    return found
