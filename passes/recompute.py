"""Recompute the activations of chosen blocks in the backward instead of keeping them.

    before                                 after
    # forward: layers.0                    # forward: layers.0
    h = aten.mm.default(x, w)              h = aten.mm.default(x, w)
    r = aten.relu.default(h)               r = aten.relu.default(h)
    # backward: layers.0                   # recompute: layers.0
                                           h_1 = aten.mm.default(x, w)
                                           r_1 = aten.relu.default(h_1)
                                           # backward: layers.0
    d = aten.mul.Tensor(g, r)              d = aten.mul.Tensor(g, r_1)

Values of a block that other blocks read, such as its output, are kept. Random operators are replayed: the forward saves
their generator state, which is swapped in around the copy, so that dropout draws the same mask again. The idea is Chen
et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
"""

import operator
from functools import cache

from torch import fx

from ..runtime.isa.instructions import SAVE_RNG, SWAP_RNG
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, annotate, belongs, is_random, note
from .program.verify import canonical


@graph_pass(requires=(canonical,))
def recompute(program: Program, plan: Plan) -> None:
    # Collected before any copies and saved states are made: those must not be copied themselves.
    inside = _forward_by_block(program, plan.recompute)
    for block in plan.recompute:
        # Values read outside the block stay alive in any case, and copies can read them.
        kept = {node for node in inside[block] if any(_reads_outside(user, block) for user in node.users)}
        _Recompute(program, inside[block] - kept).run()


def _forward_by_block(program: Program, blocks: tuple[str, ...]) -> dict[str, set[fx.Node]]:
    """The forward operators in each block."""
    holding = cache(lambda module: [block for block in blocks if f"{module}.".startswith(f"{block}.")])
    found: dict[str, set[fx.Node]] = {block: set() for block in blocks}
    for node in program.computes:
        if note(node).phase == "forward" and node.target is not SAVE_RNG:
            for block in holding(note(node).module):
                found[block].add(node)
    return found


def _reads_outside(user: fx.Node, block: str) -> bool:
    return user.op == "output" or (note(user).phase == "forward" and not belongs(user, block))


class _Recompute:
    """Copies one block's forward nodes to a point before the block's first backward reader."""

    def __init__(self, program: Program, recomputed: set[fx.Node]) -> None:
        self.program = program
        self.recomputed = recomputed
        self.copies: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        users = {user for node in self.recomputed for user in node.users}
        readers = sorted(user for user in users if user.op != "output" and note(user).phase == "backward")
        if not readers:
            return
        for node in sorted(self._needed(readers)):  # fx nodes compare by program order
            self._copy(node, before=readers[0])
        for reader in readers:
            reader.args = fx.map_arg(reader.args, self._value)
            reader.kwargs = fx.map_arg(reader.kwargs, self._value)

    def _needed(self, readers: list[fx.Node]) -> set[fx.Node]:
        """The block's nodes that the readers depend on, up to values that are kept."""
        needed: set[fx.Node] = set()
        frontier = [value for reader in readers for value in reader.all_input_nodes]
        while frontier:
            node = frontier.pop()
            if node in self.recomputed and node not in needed:
                needed.add(node)
                frontier.extend(node.all_input_nodes)
        return needed

    def _value(self, node: fx.Node) -> fx.Node:
        return self.copies.get(node, node)

    def _copy(self, node: fx.Node, before: fx.Node) -> None:
        replay = node.target is not operator.getitem and is_random(node)
        if replay:
            # Any tensor will do, since it only gives the device; some random operators take no tensors.
            like = next(iter([*node.all_input_nodes, *self.program.inputs("input").values()]))
            state = self.program.emit(SAVE_RNG, (like,), before=node, name="rng")
            self._swap(state, node, before)
        copy = self.copies[node] = self.program.copy_node(node, self._value, before)
        annotate(copy, phase="backward", recomputed=True)
        if replay:
            self._swap(state, node, before)

    def _swap(self, state: fx.Node, drawing: fx.Node, before: fx.Node) -> None:
        swap = self.program.emit(SWAP_RNG, (state,), before=before, like=note(drawing))
        annotate(swap, phase="backward", recomputed=True)
