"""Start collectives early and wait for them late, so that they run while something computes; take small sums together.

    before                                             after
    w = geminifx.all_gather(w1, 0, "row", 2)           p = geminifx.start_all_gather(w1, "row", 2)
                                                       q = geminifx.start_all_gather(w2, "row", 2)
                                                       w = geminifx.finish_collective(p, w1)
    y = aten.mm.default(x, w)                          y = aten.mm.default(x, w)
    v = geminifx.all_gather(w2, 0, "row", 2)           v = geminifx.finish_collective(q, w2)
    z = aten.mm.default(y, v)                          z = aten.mm.default(y, v)

A gather starts when the reader in front of its own is about to read, a sum behind the operator that makes its terms.
Either is waited for in front of its first reader, but the oldest already when more than IN_FLIGHT would be under way:
gradients are read by nothing but the program's results. Small sums of one layer are held back for the next one alike as
long as nobody reads them, and taken as one. Nothing passes an operator that overwrites something, such as the turn. How
a collective is written out in two is told in `async_collectives.py`.
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
"""How many collectives are under way at a time."""

SMALL_BYTES = 64 * 1024
"""Up to here a sum takes as long as messages take to arrive, however short."""


@graph_pass(requires=(turned,), gives=(overlapped,))
def overlap(program: Program, plan: Plan) -> None:
    if plan.mesh.tensor_axes:
        _make_views_early(program)
        _Schedule(program).run()


def _make_views_early(program: Program) -> None:
    """What is exchanged may be a view of what was made much earlier."""
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
    """A collective, or sums taken together."""

    members: list[fx.Node]
    started: fx.Node | None = None


class _Schedule:
    """A walk over the program that leaves compute in its order and writes collectives in front of `at`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.at = program.output
        # Collectives whose results nobody waited for yet, in the program's order; a dict, for that and to remove from
        # quickly.
        self.waiting = dict.fromkeys(node for node in program.computes if node.target in COLLECTIVES)
        self.missing = set(program.computes)  # what the walk has not come by
        self.epoch = 0  # the one that it is in
        self.epochs = write_epochs(program)
        self.due = first_readers(program)
        self.held_back = self._held_back()
        self.gathers = self._gathers()
        self.readers = {node: i for i, gathers in enumerate(self.gathers) for node in gathers}
        self.reader = 0  # whose gathers may start
        self.collectives: dict[fx.Node, _Collective] = {}  # those that are ready, started or held back
        self.open: dict[Any, _Collective] = {}  # small sums, by kind, that others can still join
        self.under_way: list[_Collective] = []  # the oldest first

    def _held_back(self) -> set[fx.Node]:
        """The small sums that can wait for the next one alike."""
        order, alike = self.program.positions(), defaultdict(list)
        for node in self.waiting:
            if _is_small(node):
                alike[self._kind(node)].append(node)
        # A sum that is read in front of the next one cannot be taken with it.
        pairs = (pair for nodes in alike.values() for pair in pairwise(nodes))
        return {node for node, following in pairs if order[following] < self.due[node]}

    def _kind(self, node: fx.Node) -> Any:
        """Sums of one kind can be taken together: those of one numbered module, such as layers.3, or else of one."""
        module = note(node).module
        layer = re.match(r".*?\.\d+(?=\.|$)", module)
        return self.epochs[node], node.args[1:], tensor_type(node).dtype, layer[0] if layer else module

    def _gathers(self) -> list[list[fx.Node]]:
        """By their readers, in order."""
        found = defaultdict(list)
        for node in self.waiting:
            if node.target is ALL_GATHER:
                found[self.due[node]].append(node)
        return list(found.values())

    # -- the walk ------------------------------------------------------------------------------------------

    def run(self) -> None:
        old = list(self.waiting)
        for node in [*self.program.computes, self.program.output]:
            # In front of a node is written what it waits for, and behind it what it made ready to start.
            self.at = node
            if node.target in COLLECTIVES:
                self._stand(node)
                continue
            for value in node.all_input_nodes:
                self._read(value)
            # The node overwrites something, and what is exchanged may be a view of that: all is waited for that began
            # in front of it, as if it were read here.
            if self.epochs[node] != self.epoch:
                for collective in [other for other in self.waiting if self.epochs[other] == self.epoch]:
                    self._read(collective)
            self.at, self.epoch = node.next, self.epochs[node]
            self.missing.discard(node)
            self._sums_of(node)
            self._start_gathers()
        for node in reversed(old):  # the last first: collectives of collectives are read by nobody else
            self.program.graph.erase_node(node)

    def _stand(self, node: fx.Node) -> None:
        """At its old place a collective starts, if it has not and does not wait for another's result."""
        # Once another collective has been waited for, what it brought stands in its place among the arguments, and that
        # is not missing.
        if node in self.waiting and node not in self.collectives and node.args[0] not in self.missing:
            self._ready(node)

    def _read(self, value: fx.Node) -> None:
        """A value is about to be read."""
        # The reader of a gather has come: the next reader's start beside what this one computes. Several readers'
        # would be whole tensors on the device that nobody reads for long.
        if value in self.waiting and value in self.readers:
            self.reader = max(self.reader, self.readers[value] + 1)
            self._start_gathers()
        self._finish(value)

    def _start_gathers(self) -> None:
        for node in chain(*self.gathers[self.reader : self.reader + 1]):
            if self.epochs[node] == self.epoch:
                self._stand(node)

    def _sums_of(self, value: fx.Node) -> None:
        """The terms of sums are made."""
        # Sums start at once, unlike gathers: the terms are there already, and a sum is no longer than they are.
        for user in list(value.users):
            if user in self.waiting and user.target is not ALL_GATHER and self.epochs[user] == self.epoch:
                self._ready(user)

    # -- collectives -----------------------------------------------------------------------------------------

    def _ready(self, node: fx.Node) -> None:
        """A collective can start, and does unless it is held back."""
        if not _is_small(node):
            collective = self.collectives[node] = _Collective([node])
        else:
            collective = self.collectives[node] = self.open.setdefault(self._kind(node), _Collective([]))
            collective.members.append(node)
        if node not in self.held_back:
            self._start(collective)

    def _start(self, collective: _Collective) -> None:
        kind = self._kind(collective.members[0])
        if self.open.get(kind) is collective:  # nobody can join it any more
            del self.open[kind]
        # What is exchanged and what is filled both stay on the device until a collective is waited for.
        while len(self.under_way) >= IN_FLIGHT:
            self._wait_for(self.under_way[0])
        collective.started = Writer(self.program, self.at).start(collective.members)
        self.under_way.append(collective)

    def _finish(self, node: fx.Node) -> None:
        """Wait for a collective's result, and first for what it is made of."""
        if node not in self.waiting:
            return
        self._finish(node.args[0])
        if node not in self.collectives:
            self._ready(node)
        if node in self.waiting:  # starting others may have waited for it, to make room
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
        for value in values:  # terms of further sums, such as one over another axis
            self._sums_of(value)


def _is_small(node: fx.Node) -> bool:
    return node.target is ALL_REDUCE and tensor_type(node).num_bytes <= SMALL_BYTES
