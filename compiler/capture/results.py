"""What a captured step returns: how large its logits are and what stands in for them; which outputs each gradient comes
from, and which tensors the backward reads.

A compiled step may never compute its logits. The model's result then holds an `AbsentOutput` in their place.
"""

import operator
from typing import Any, NoReturn

from torch import fx

from ...passes.canonicalize import canonicalize
from ...passes.patterns.cross_entropy import find_losses
from ...passes.program.plan import Plan
from ...passes.program.program import Program, aliased_inputs, note, type_of
from ...passes.program.types import TensorType
from ...runtime.isa.errors import StateError
from ...runtime.isa.instructions import TURN
from ...runtime.isa.linear_cross_entropy import ABSENT

COPIES = 3
"""Tensors as large as the logits in the loss's backward: log-probabilities, their gradient, and that of the logits."""


def logits_bytes(captured: Program) -> int:
    """Peak device bytes that computing the losses in pieces would save; 0 if that is impossible."""
    program = captured.copy()
    canonicalize.rewrite(program, Plan())
    types = (type_of(loss.nll.args[0]) for loss in find_losses(program))
    return sum(COPIES * t.num_bytes for t in types if isinstance(t, TensorType))


def absent_outputs(program: Program) -> frozenset[int]:
    """Positions of outputs that a lowered program does not compute."""
    returned = program.results_of("output")
    outputs = [node for turn in program.calls(TURN) for node in turn.args[0]]
    outputs += [returned[str(i)] for i in range(len(returned))]
    return frozenset(i for i, node in enumerate(outputs) if node.target is ABSENT)


def gradient_sources(program: Program) -> dict[str, frozenset[int]]:
    """Maps each gradient's role to the positions of the outputs it comes from; tied parameters go by their first
    name."""
    reached: dict[fx.Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        kind, _, position = note(node).role.partition(":")
        own = [frozenset({int(position)})] if kind == "tangent" else []
        reached[node] = frozenset().union(*own, *(reached[value] for value in node.all_input_nodes))
    tied = {name: note(node).tied for name, node in program.inputs("parameter").items() if note(node).tied}
    found: dict[str, frozenset[int]] = {}
    for role, value in program.results.items():
        if role.startswith("gradient:"):
            name = role.removeprefix("gradient:")
            role = f"gradient:{tied.get(name, name)}"
            found[role] = found.get(role, frozenset()) | reached[value]
    return found


def saved(program: Program) -> tuple[frozenset[int], frozenset[int]]:
    """Positions of the inputs and of the outputs whose memory the backward of a lowered training program reads."""
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    elements: dict[tuple[fx.Node, int], fx.Node] = {}
    read, turned = set[fx.Node](), False
    for node in program.graph.nodes:
        own, sources = node, list(aliased_inputs(node))
        if node.target is operator.getitem:  # an operator's results have separate memory, unless they are views
            own, sources = elements.setdefault(node.args, node), list(aliased_inputs(node.args[0]))
        roots[node] = frozenset[fx.Node]().union(*(roots[source] for source in sources)) or frozenset({own})
        if turned:
            read.update(*(roots[value] for value in node.all_input_nodes))
        turned = turned or node.target is TURN
    both = program.placeholders, [node for turn in program.calls(TURN) for node in turn.args[0]]
    inputs, results = (
        frozenset(i for i, node in enumerate(nodes) if roots[node] & read and isinstance(type_of(node), TensorType))
        for nodes in both
    )
    return inputs, results


class AbsentOutputError(StateError, AttributeError):
    """An output that was not computed was used.

    It is also an AttributeError, so that code that probes outputs for an attribute before using them, as
    mixed-precision wrappers do, skips this one.
    """


class AbsentOutput:
    """Stands in for logits whose loss is computed in pieces. It may be kept, printed, copied; any other use raises."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise AbsentOutputError(
            "this output of the model, the logits, was not computed, to save memory: the loss is computed in pieces "
            "(plan.fuse_loss), or the output is sharded over processes, none of which has all of it "
            "(plan.request.mode), or it is on the process that runs the last stage of a pipeline (plan.schedule). To "
            "get it, compile with fuse_loss=False; to train through it, or to get it from a sharded model or on every "
            "process, compile with outputs='all'. Evaluation under torch.no_grad() always returns it, in a pipeline "
            "on the last stage."
        )

    def __repr__(self) -> str:
        return "<logits, not computed: compile(..., outputs='all') returns them>"

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        cls._refuse(cls())

    __hash__ = object.__hash__
    __getattr__ = __setattr__ = __delattr__ = __call__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __setitem__ = __delitem__ = _refuse
    __float__ = __int__ = __index__ = __complex__ = __array__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = __rmatmul__ = _refuse
    __and__ = __or__ = __xor__ = __rand__ = __ror__ = __rxor__ = _refuse
