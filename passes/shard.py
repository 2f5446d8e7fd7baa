"""Shard tensors over the processes: a program of whole tensors becomes the program of one rank's shards.

    before (two ranks on axis tp, mode "1d")       after
    def training(x: f32[8, 4],                     def training(x: f32[8, 4],
                 w1: f32[8, 4],                                 w1: f32[4, 4] | on tp=S0,
                 w2: f32[4, 8]):                                w2: f32[4, 4] | on tp=S1):
        t = aten.t.default(w1)                         t = aten.t.default(w1)
        y = aten.mm.default(x, t)                      y = aten.mm.default(x, t)         # on tp=S1
        t2 = aten.t.default(w2)                        t2 = aten.t.default(w2)
        z = aten.mm.default(y, t2)                     z = aten.mm.default(y, t2)        # on tp=P
        r = aten.relu.default(z)                       z2 = geminifx.all_reduce(z, "tp", "sum")
                                                       r = aten.relu.default(z2)

The mode's table (`sharding/modes.py`) says what each axis shards, the use of each parameter decides how it is sharded
(`sharding/parameters.py`), and for every operator the legal placements (`sharding/rules.py`) with the least traffic are
chosen. The batch is divided along the axes that shard it; all ranks of a tensor parallel group are given the whole
batch. A program reads its rank only at run time, so that all ranks have the same program. The placements are those of
GSPMD and DTensor; `sharding/special.py` handles operators for which those would gather.
"""

from collections import Counter
from math import prod

import torch
from torch import fx

from ..runtime.isa.errors import ShardingError
from ..runtime.isa.instructions import MICROBATCH
from ..runtime.isa.layout import contiguous_stride
from ..runtime.isa.linear_cross_entropy import ABSENT
from ..runtime.isa.mesh import (
    PARTIAL,
    REPLICATE,
    Placement,
    Placements,
    Shard,
    local_shape,
    of_gradient,
    placements_text,
)
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, annotate, microbatches_of, note, type_of
from .program.types import NumberType, TensorType
from .program.verify import canonical, sharded
from .sharding.engine import Sharder, Value
from .sharding.modes import roles_of
from .sharding.parameters import place_parameters
from .sharding.special import SPECIAL

aten = torch.ops.aten
PASSED_THROUGH = (aten.t.default, aten._to_copy.default, aten.add.Tensor)
MAKERS = (*PASSED_THROUGH, aten.mm.default, aten.embedding_dense_backward.default)
"""Operators that make the gradients of weights, and those between these and the final gradient."""


@graph_pass(requires=(canonical,), gives=(sharded,))
def shard(program: Program, plan: Plan) -> None:
    axes = plan.mesh.tensor_axes
    if not axes:
        return
    old = program.nodes
    sharder = Sharder(program, axes, roles_of(plan))
    found = place_parameters(program, plan).placements
    for role, node in _inputs(program).items():
        kind, _, name = role.partition(":")
        if kind == "parameter":
            _place_parameter(sharder, node, found[name])
        else:
            sharder.values[node] = Value(node, sharder.everywhere)
    _want_gradients(sharder, program, found)
    _divide_batch(sharder, program)
    for node in old:
        if node.op == "call_function" and node not in sharder.values:
            sharder.at = node
            _lower(sharder, node)
    program.set_results({role: _result(sharder, plan, role, node, found) for role, node in program.results.items()})
    for node in reversed(old):
        if node.op == "call_function":
            program.graph.erase_node(node)
    program.eliminate_dead_code()


def _inputs(program: Program) -> dict[str, fx.Node]:
    return {note(node).role: node for node in program.placeholders}


def _lower(sharder: Sharder, node: fx.Node) -> None:
    SPECIAL.get(node.target, Sharder.lower)(sharder, node)
    read = [value for value in node.all_input_nodes if not isinstance(type_of(value), NumberType)]
    if read and all(value in sharder.weights for value in read):
        sharder.weights.add(node)


def _place_parameter(sharder: Sharder, node: fx.Node, placements: Placements) -> None:
    """Change a parameter's input to this rank's shard."""
    whole = sharder.type(node)
    shape = local_shape(whole.shape, placements, sharder.axes)
    annotate(node, type=TensorType(whole.dtype, shape, contiguous_stride(shape)),
             placement=placements_text(placements, sharder.axes))  # fmt: skip
    sharder.values[node] = Value(node, placements)
    sharder.weights.add(node)


def _divide_batch(sharder: Sharder, program: Program) -> None:
    """Divide the inputs that have one row per example, or their microbatches, along the axes that shard the batch.
    Raises ShardingError if the number of rows is not a multiple of the number of ranks."""
    axes = [axis for axis, role in zip(sharder.axes, sharder.roles, strict=True) if role.activation == "batch"]
    inputs = [node for node in program.inputs("input").values() if sharder.type(node).shape]
    if not axes or not inputs:
        return
    batches = [batch for node in inputs for batch in microbatches_of(node) or [node]]
    counts = Counter(sharder.type(node).shape[0] for node in batches)
    rows, ranks = counts.most_common(1)[0][0], prod(axis.size for axis in axes)  # positions [1, length] may come first
    if rows % ranks:
        parts = next((node.args[2] for node in batches if node.target is MICROBATCH), 1)
        raise ShardingError(
            f"a {'microbatch' if parts > 1 else 'batch'} of {rows} example(s) does not divide evenly over "
            f"{' x '.join(f'{a.name} {a.size}' for a in axes)} ranks; pass every group of ranks a multiple of "
            f"{ranks * parts} examples"
        )
    placements = tuple(Shard(0) if axis in axes else REPLICATE for axis in sharder.axes)
    sharder.at = next(node for node in program.graph.nodes if node.op != "placeholder")
    for node in batches:
        if sharder.type(node).shape[0] == rows:
            if node.target is MICROBATCH:
                sharder.lower(node)
            sharder.values[node] = Value(sharder.local(node, placements), placements)


def _want_gradients(sharder: Sharder, program: Program, found: dict[str, Placements]) -> None:
    """Record in `sharder.wanted` how gradients should be made: sharded like the parameter, and as partial sums over the
    replicas, which are summed anyway. The wish is passed on through transposes, casts and the additions of shared
    parameters."""
    gradients = program.results_of("gradient").items()
    rest = [(node, of_gradient(found[name], sharder.axes)) for name, node in gradients if name in found]
    while rest:
        node, placements = rest.pop()
        if node.target not in MAKERS or len(sharder.type(node).shape) != 2:
            continue
        sharder.wanted[node] = placements
        if node.target is aten.t.default:
            placements = tuple(_swapped(p) for p in placements)
        if node.target in PASSED_THROUGH:
            rest += [(value, placements) for value in node.all_input_nodes]


def _swapped(placement: Placement) -> Placement:
    return Shard(1 - placement.dim, placement.sections) if isinstance(placement, Shard) else placement


def _result(sharder: Sharder, plan: Plan, role: str, node: fx.Node, found: dict[str, Placements]) -> fx.Node:
    """The result in the placement it leaves with. Gradients of parameters lie like their parameters, as partial sums
    over the replicas; all else is replicated. Beside a loss that is the only output with a gradient, sharded outputs
    such as logits are left out unless outputs="all": gathered, they would be the largest tensors of all."""
    kind, _, name = role.partition(":")
    if kind == "gradient" and name in found:
        return _gradient(sharder, node, of_gradient(found[name], sharder.axes))
    tangents = sharder.program.inputs("tangent")
    beside_loss = kind == "output" and len(tangents) == 1 and name not in tangents and plan.request.outputs == "loss"
    sharded = sharder.placements(node) != sharder.everywhere
    sharder.at = sharder.program.output if node.op == "placeholder" else node
    if beside_loss and sharded:
        return sharder.emit(ABSENT, sharder.values[node].node)
    return sharder.local(node, sharder.everywhere)


def _gradient(sharder: Sharder, node: fx.Node, wanted: Placements) -> fx.Node:
    """A gradient as one rank's part of a sum over the replicas. One that every replica has whole, such as a weight
    penalty's, is divided by their number."""
    pairs = list(zip(sharder.placements(node), wanted, sharder.axes, strict=True))
    sharder.at = sharder.program.output if node.op == "placeholder" else node
    part = sharder.local(node, tuple(w if w == p or w != PARTIAL else REPLICATE for p, w, _ in pairs))
    whole = prod(axis.size for p, w, axis in pairs if w == PARTIAL and p != PARTIAL)
    if whole == 1:
        return part
    behind = sharder.program.output if part.op == "placeholder" else part.next
    term = sharder.program.emit(aten.div.Scalar, (part, whole), before=behind, like=note(node))
    return sharder.value(term, wanted).node
