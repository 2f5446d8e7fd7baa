"""Start collectives early and wait for them late, so that they overlap with compute, and merge small all-reduces.

    before                                             after
    w = geminifx.all_gather(w1, 0, "row", 2)           p = geminifx.start_all_gather(w1, "row", 2)
                                                       q = geminifx.start_all_gather(w2, "row", 2)
                                                       w = geminifx.finish_collective(p, w1)
    y = aten.mm.default(x, w)                          y = aten.mm.default(x, w)
    v = geminifx.all_gather(w2, 0, "row", 2)           v = geminifx.finish_collective(q, w2)
    z = aten.mm.default(y, v)                          z = aten.mm.default(y, v)

An all-gather starts just before the reader of the previous all-gather, a reduction right after its input is computed.
Both are waited for in front of their first reader, and earlier only if more than IN_FLIGHT would be in flight:
gradients, for example, have no reader but the program's results. Small all-reduces of one layer are held back for the
next one of the same kind as long as nobody reads them, and run as one. No collective moves across an operator that
writes, such as the turn. `sharding/async_collectives.py` shows how a collective becomes a start and a finish.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from torch import fx

from ..runtime.isa.instructions import ALL_GATHER, ALL_REDUCE, COLLECTIVES
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, aliased_inputs, note, tensor_type
from .program.verify import overlapped, turned
from .sharding.async_collectives import Writer, first_readers, write_epochs

IN_FLIGHT = 4
"""How many collectives may be in flight at a time."""

SMALL_BYTES = 64 * 1024
"""Up to this size the latency of its messages dominates an all-reduce's time."""


@graph_pass(requires=(turned,), gives=(overlapped,))
def overlap(program: Program, plan: Plan) -> None:
    if plan.mesh.tensor_axes:
        _make_views_early(program)
        _Schedule(program).run()


def _make_views_early(program: Program) -> None:
    """Move the views that collectives read up to the node whose storage they share, so that they do not delay the
    start."""
    epochs = write_epochs(program)
    for collective in [node for node in program.computes if node.target in COLLECTIVES]:
        views, base = list[fx.Node](), collective.args[0]
        while sources := list(aliased_inputs(base)):
            views.append(base)
            base = sources[0]
        movable = base.op == "call_function" and base.target not in COLLECTIVES
        if movable and all(epochs[view] == epochs[base] for view in views):
            for view in views:
                base.append(view)


@dataclass(eq=False)
class _Collective:
    """One collective, or several small all-reduces merged into one."""

    members: list[fx.Node]
    started: fx.Node | None = None


class _Schedule:
    """A walk over the program that keeps compute in its order and inserts collectives before `at`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.at = program.output
        # Collectives not yet waited for. A dict keeps the program's order and removes in constant time.
        self.waiting = dict.fromkeys(node for node in program.computes if node.target in COLLECTIVES)
        self.missing = set(program.computes)  # nodes that the walk has not reached
        self.epoch = 0  # the write epoch that the walk is in
        self.epochs = write_epochs(program)
        self.due = first_readers(program)
        self.held_back = self._held_back()
        self.gathers = self._gathers()
        self.readers = {node: i for i, gathers in enumerate(self.gathers) for node in gathers}
        self.reader = 0  # index of the reader whose gathers may start
        self.collectives: dict[fx.Node, _Collective] = {}  # ready ones, started or held back
        self.open: dict[Any, _Collective] = {}  # small all-reduces by kind that others can still join
        self.under_way: list[_Collective] = []  # oldest first

    def _held_back(self) -> set[fx.Node]:
        """The small all-reduces that can wait for the next one of their kind."""
        order, alike = self.program.positions(), defaultdict(list)
        for node in self.waiting:
            if _is_small(node):
                alike[self._kind(node)].append(node)
        # An all-reduce read before the next one of its kind cannot be merged with it.
        pairs = (pair for nodes in alike.values() for pair in pairwise(nodes))
        return {node for node, following in pairs if order[following] < self.due[node]}

    def _kind(self, node: fx.Node) -> Any:
        """Equal for all-reduces that may be merged: those of one numbered module, such as layers.3, or else of one
        module."""
        module = note(node).module
        layer = re.match(r".*?\.\d+(?=\.|$)", module)
        return self.epochs[node], node.args[1:], tensor_type(node).dtype, layer[0] if layer else module

    def _gathers(self) -> list[list[fx.Node]]:
        """The all-gathers, grouped by their first reader, in program order."""
        found = defaultdict(list)
        for node in self.waiting:
            if node.target is ALL_GATHER:
                found[self.due[node]].append(node)
        return list(found.values())

    # -- the walk ------------------------------------------------------------------------------------------

    def run(self) -> None:
        old = list(self.waiting)
        for node in [*self.program.computes, self.program.output]:
            # Insert what a node waits for before it, and what it makes ready to start after it.
            self.at = node
            if node.target in COLLECTIVES:
                self._stand(node)
                continue
            for value in node.all_input_nodes:
                self._read(value)
            # The node writes, perhaps to the storage that a pending collective reads. Finish every collective that
            # precedes it, as if it were read here.
            if self.epochs[node] != self.epoch:
                for collective in [other for other in self.waiting if self.epochs[other] == self.epoch]:
                    self._read(collective)
            self.at, self.epoch = node.next, self.epochs[node]
            self.missing.discard(node)
            self._sums_of(node)
            self._start_gathers()
        for node in reversed(old):  # in reverse, because a collective of a collective is its only reader
            self.program.graph.erase_node(node)

    def _stand(self, node: fx.Node) -> None:
        """Start a collective at its original place, unless it has started or its input is still missing."""
        # The finish of another collective has replaced that collective among the arguments, and finishes are never
        # missing.
        if node in self.waiting and node not in self.collectives and node.args[0] not in self.missing:
            self._ready(node)

    def _read(self, value: fx.Node) -> None:
        """Called in front of a node that reads `value`."""
        # A gather is about to be read: start the next reader's gathers, to overlap with this reader's compute. Starting
        # those of more readers would keep whole tensors on the device unread for long.
        if value in self.waiting and value in self.readers:
            self.reader = max(self.reader, self.readers[value] + 1)
            self._start_gathers()
        self._finish(value)

    def _start_gathers(self) -> None:
        for node in chain(*self.gathers[self.reader : self.reader + 1]):
            if self.epochs[node] == self.epoch:
                self._stand(node)

    def _sums_of(self, value: fx.Node) -> None:
        """Called when `value` exists: start the reductions that read it."""
        # Reductions start at once, unlike gathers: the input is in memory already, and the result is no larger.
        for user in list(value.users):
            if user in self.waiting and user.target is not ALL_GATHER and self.epochs[user] == self.epoch:
                self._ready(user)

    # -- collectives -----------------------------------------------------------------------------------------

    def _ready(self, node: fx.Node) -> None:
        """Register a collective that can start, and start it unless it is held back."""
        if not _is_small(node):
            collective = self.collectives[node] = _Collective([node])
        else:
            collective = self.collectives[node] = self.open.setdefault(self._kind(node), _Collective([]))
            collective.members.append(node)
        if node not in self.held_back:
            self._start(collective)

    def _start(self, collective: _Collective) -> None:
        kind = self._kind(collective.members[0])
        if self.open.get(kind) is collective:  # nothing can join it any more
            del self.open[kind]
        # Both the input and the output of a collective stay on the device until it is waited for.
        while len(self.under_way) >= IN_FLIGHT:
            self._wait_for(self.under_way[0])
        collective.started = Writer(self.program, self.at).start(collective.members)
        self.under_way.append(collective)

    def _finish(self, node: fx.Node) -> None:
        """Wait for a collective's result, after the collectives that it depends on."""
        if node not in self.waiting:
            return
        self._finish(node.args[0])
        if node not in self.collectives:
            self._ready(node)
        if node in self.waiting:  # starting others may have waited for it, to stay within IN_FLIGHT
            if self.collectives[node].started is None:  # it was held back for others that are not ready
                self._start(self.collectives[node])
            self._wait_for(self.collectives[node])

    def _wait_for(self, collective: _Collective) -> None:
        assert collective.started is not None
        self.under_way.remove(collective)
        values = Writer(self.program, self.at).finish(collective.started, collective.members)
        for member, value in zip(collective.members, values, strict=True):
            member.replace_all_uses_with(value)
            del self.waiting[member]
        for value in values:  # inputs of further reductions, such as one over another axis
            self._sums_of(value)


def _is_small(node: fx.Node) -> bool:
    return node.target is ALL_REDUCE and tensor_type(node).num_bytes <= SMALL_BYTES
