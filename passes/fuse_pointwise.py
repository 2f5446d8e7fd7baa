"""Fuse neighbouring pointwise operators and reductions: each group becomes a function, compiled as a whole.

    before                                       after
    a = aten.add.Tensor(x, y)                    @geminifx.fused
    p = aten.pow.Tensor_Scalar(a, 2)             def norm_forward(x, y): ...
    m = aten.mean.dim(p, [-1], True)
    r = aten.rsqrt.default(m)                    results = norm_forward(x, y)
    n = aten.mul.Tensor(a, r)                    a = results[0]
    q = aten.mm.default(n, w)                    n = results[1]
    ...                                          q = aten.mm.default(n, w)

The operators between two matrix products then read and write memory once instead of once each. They are most of the
work of a Llama block besides its products. A group ends where an operator outside reads it. Views that other operators
read too are made again after the group, because a kernel cannot return views.
"""

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from ..runtime.isa.instructions import PLACED, TURN
from .program.manager import graph_pass
from .program.outline import Segment, outline
from .program.plan import Plan
from .program.program import Program, aliased_inputs, is_random, note, type_of, writes
from .program.types import TensorType
from .program.verify import released

aten = torch.ops.aten

FUSED_TOO = frozenset({
    aten._to_copy.default, aten.cat.default, aten.clone.default, aten.mean.dim, aten.native_layer_norm.default,
    aten.slice_backward.default, aten.sum.dim_IntList,
})  # fmt: skip
"""Operators that work element by element or row by row, besides those that torch tags as pointwise."""
FEWEST = 2
"""The fewest operators in a group, not counting views."""


@graph_pass(requires=(released,))
def fuse_pointwise(program: Program, plan: Plan) -> None:
    if plan.request.kernels == "fused":
        groups = [group for group in _groups(program) if _is_worth_it(group)]
        outline(program, [Segment(_without_views(program, group)) for group in groups], fused=True)


def _groups(program: Program) -> Iterator[list[fx.Node]]:
    """Connected groups of fusable operators. A group is complete before any operator outside of it reads or overwrites
    its values."""
    group_of: dict[fx.Node, list[fx.Node]] = {}  # group of each member of a group that may still grow
    reads: dict[fx.Node, set[fx.Node]] = defaultdict(set)  # by storage, the members of such groups that read it
    storage, order, action = dict[fx.Node, fx.Node](), program.positions(), ""
    for node in program.computes:
        if node.target not in PLACED and note(node).action != action:  # the next action of the pipeline's rank
            action = note(node).action
            yield from _different(group_of.values())
            group_of.clear()
        storage[node] = next((storage.get(base, base) for base in aliased_inputs(node)), node)
        read = [group_of[value] for value in node.all_input_nodes if value in group_of]
        if _is_fusable(node) and (read or not (_is_view(node) or node.target is operator.getitem)):
            group = sorted({node, *(member for other in read for member in other)}, key=order.__getitem__)
            group_of |= dict.fromkeys(group, group)
            for value in node.all_input_nodes:
                reads[storage.get(value, value)].add(node)
            continue
        if node.target is TURN:
            read = list(group_of.values())
        elif node.target in PLACED or writes(node):  # may overwrite or free its operands: their readers come first
            touched = (storage.get(value, value) for value in node.all_input_nodes)
            read += [group_of[member] for value in touched for member in reads[value] if member in group_of]
        for group in _different(read):
            yield group
            for member in group:
                del group_of[member]
    yield from _different(group_of.values())


def _different(groups: Iterable[list[fx.Node]]) -> list[list[fx.Node]]:
    return list({id(group): group for group in groups}.values())


def _is_fusable(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target in PLACED or node.target is TURN or is_random(node) or writes(node):
        return False
    if node.target is operator.getitem:
        return node.args[0].target in FUSED_TOO
    known = node.target in FUSED_TOO or torch.Tag.pointwise in getattr(node.target, "tags", ())
    return (known or _is_view(node)) and all(isinstance(type_of(value), TensorType) for value in node.all_input_nodes)


def _is_view(node: fx.Node) -> bool:
    return node.target is not operator.getitem and any(True for _ in aliased_inputs(node))


def _is_worth_it(group: list[fx.Node]) -> bool:
    """Whether fusing saves anything: a group has several operators and hands out only tensors."""
    handed_out = (node for node in group if not set(group).issuperset(node.users))
    several = sum(not _is_view(node) and node.target is not operator.getitem for node in group) >= FEWEST
    return several and all(isinstance(type_of(node), TensorType) for node in handed_out)


def _without_views(program: Program, group: list[fx.Node]) -> tuple[fx.Node, ...]:
    """The group without views that only other operators read. Views that both read are duplicated for the others."""
    inside, last = set(group), group[-1]
    copies: dict[fx.Node, fx.Node] = {}

    def outside(view: fx.Node) -> fx.Node:
        """The copy of `view` for other operators, made after the group from what the group reads or computes."""
        if view not in inside or not _is_view(view):
            return view
        if view not in copies:
            arguments = {value: outside(value) for value in view.all_input_nodes}
            copies[view] = program.copy_node(view, arguments.__getitem__, before=behind)
        return copies[view]

    behind = last.next
    for node in group:
        readers = [user for user in node.users if user not in inside and user not in copies.values()]
        if readers and _is_view(node):
            found = outside(node)
            for reader in readers:
                reader.replace_input_with(node, found)
    for node in reversed(group):
        if not node.users:
            program.graph.erase_node(node)
            inside.remove(node)
            if node in copies:
                copies[node].name = node.name
    return tuple(node for node in group if node in inside)
