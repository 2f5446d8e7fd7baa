"""Remove what capture leaves behind: no-ops, common subexpressions, dead code, second inputs of shared parameters.

    before                                             after
    w2 = input, tied to w                              (gone)
    a = aten.t.default(w)                              a = aten.t.default(w)
    b = aten.detach.default(a)
    c = aten.t.default(w)                              y = aten.mm.default(x, a)
    y = aten.mm.default(x, c)                          add = aten.add.Tensor(dw, dw2)
    return {"gradient:w": dw, "gradient:w2": dw2}      return {"gradient:w": add}

Numerics do not change: a shared parameter's gradient is the same sum that eager autograd computes.
"""

from typing import Any

import torch
from torch import fx

from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, is_random, note, writes
from .program.types import freeze
from .program.verify import NO_OPS, canonical

TRANSPOSE = torch.ops.aten.t.default


@graph_pass(gives=(canonical,))
def canonicalize(program: Program, plan: Plan) -> None:
    for node in program.nodes:
        if node.target in NO_OPS:
            program.replace(node, node.args[0])
        elif node.target is TRANSPOSE and node.args[0].target is TRANSPOSE:
            program.replace(node, node.args[0].args[0])
    _merge_tied(program)
    _merge_repeated(program)
    program.eliminate_dead_code()


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
    stay separate: if two of them shared memory, a caller that changes one would change the other, or what the backward
    reads."""
    seen: dict[Any, fx.Node] = {}
    handed_out = {value for role, value in program.results.items() if not role.startswith("gradient:")}
    for node in program.computes:
        if node.op != "call_function" or writes(node) or is_random(node) or node in handed_out:
            continue
        arguments = freeze((node.args, node.kwargs), node=lambda value: value)
        key = (node.target, arguments, note(node).phase)
        first = seen.setdefault(key, node)
        if first is not node:
            program.replace(node, first)
