"""Keep the activations of chosen blocks on the host between their last reader in the forward and the first behind it.

    before                                  after
    # forward: layers.0                     # forward: layers.0
    y = aten.relu.default(x)                y = aten.relu.default(x)
                                            x_host = geminifx.offload(x)
    # forward: layers.2                     # forward: layers.2
                                            geminifx.depart(x, x_host)
    w2 = geminifx.wait(c2, 2)               w2 = geminifx.wait(c2, 2)
    # backward: layers.1                    # backward: layers.1
                                            reload = geminifx.reload(x_host)
    w1 = geminifx.wait(c1, 1)               w1 = geminifx.wait(c1, 1)
    # backward: layers.0                    # backward: layers.0
                                            x_1 = geminifx.arrive(reload, x_host)
    d = aten.mul.Tensor(g, x)               d = aten.mul.Tensor(g, x_1)

A block's activations are what its backward reads of the forward: of a recomputed block that is where it begins, of
another all that it saves. Views of them are made again behind the turn. What stays on the device: values that are
small, that the caller is handed, or that something overwrites, and those that would leave only as the forward ends.

Copies have the time in which chunks of as many bytes are computed with, a few at most, times the plan's `prefetch`: 0
waits at once.
"""

from bisect import bisect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import fx

from ..runtime.isa.instructions import (
    ARRIVE,
    DEPART,
    FETCH,
    FINISH_COLLECTIVE,
    FINISH_RECEIVE,
    OFFLOAD,
    PER_CHUNK,
    RELOAD,
    TURN,
    WAIT,
)
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import (
    Phase,
    Program,
    aliased_inputs,
    belongs,
    note,
    overwritten_inputs,
    tensor_type,
    type_of,
)
from .program.types import TensorType
from .program.verify import chunked, offloaded

SMALLEST_BYTES = 2**20
"""Smaller values stay: copies of theirs would not reach the bus's rate, and there is little to gain."""

MOST_CHUNKS = 4
"""So many chunks' time copies have at most: meanwhile values are on the device."""


@graph_pass(requires=(chunked,), gives=(offloaded,))
def offload(program: Program, plan: Plan) -> None:
    if plan.offload and program.calls(TURN):
        activations = _activations(program, plan.offload)
        _bring_back(program, _send(program, activations, plan.prefetch), plan.prefetch)


@dataclass(frozen=True)
class _Activation:
    """A value of the forward that its backward reads: behind `last` it is not read before the turn. `views` share its
    storage."""

    value: fx.Node
    views: set[fx.Node]
    last: fx.Node
    readers: list[fx.Node]

    @property
    def num_bytes(self) -> int:
        return tensor_type(self.value).num_bytes


# -- which -------------------------------------------------------------------------------------------------


def _activations(program: Program, blocks: tuple[str, ...]) -> list[_Activation]:
    """In the order in which the forward is done with them."""
    order, found = program.positions(), []
    for value, names in _storages(program).items():
        users = sorted({user for name in names for user in name.users}, key=order.__getitem__)
        readers = [user for user in users if note(user).phase == "backward"]
        if _is_large(value) and any(belongs(reader, block) for reader in readers for block in blocks):
            before = (user for user in users if note(user).phase == "forward")
            last = max([*names, *before], key=order.__getitem__)
            found.append(_Activation(value, names - {value}, last, readers))
    return sorted(found, key=lambda activation: order[activation.last])


def _is_large(value: fx.Node) -> bool:
    """Whether it is a tensor large enough, and all that its storage holds."""
    kind = type_of(value)
    if not isinstance(kind, TensorType) or kind.num_bytes < SMALLEST_BYTES:
        return False
    return kind.num_bytes == prod(kind.shape) * kind.dtype.itemsize


def _storages(program: Program) -> dict[fx.Node, set[fx.Node]]:
    """By the forward's values that have a storage of their own, all names of it; without what may not be moved."""
    holder: dict[fx.Node, fx.Node] = {node: node for node in program.placeholders}
    names: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    fixed = {program.output, *program.placeholders}
    elements: dict[tuple[fx.Node, object], fx.Node] = {}
    for node in program.computes:
        fixed.update(holder[value] for value in overwritten_inputs(node) if value in holder)
        if note(node).phase == "backward":
            continue
        # What a collective, or a message, has brought is read by way of its finish alone.
        has_come = node.target in (FINISH_COLLECTIVE, FINISH_RECEIVE)
        sources = [] if has_come else [holder[value] for value in aliased_inputs(node)]
        if sources and isinstance(type_of(sources[0]), tuple):  # a result of several, each with a storage of its own
            sources = [elements.setdefault((sources[0], node.args[1]), node)]
        if len(set(sources)) > 1 or node.target in PER_CHUNK:
            fixed.update([node, *sources])
        holder[node] = sources[0] if sources else node
        names[holder[node]].add(node)
    fixed.update(holder[value] for value in program.output.all_input_nodes if value in holder)
    return {value: found for value, found in names.items() if value not in fixed}


# -- where -------------------------------------------------------------------------------------------------


class _Stretches:
    """A phase from each chunk's arrival to the next one's: in each of them something is computed."""

    def __init__(self, program: Program, phase: Phase) -> None:
        self.waits = [node for node in program.calls(WAIT) if note(node).phase == phase]
        self.order = program.positions()
        self.chunk_bytes = max((tensor_type(node).num_bytes for node in program.calls(FETCH)), default=1)

    def of(self, node: fx.Node) -> int:
        """The number of the stretch that a node is in; -1 in front of the first."""
        return bisect([self.order[wait] for wait in self.waits], self.order[node]) - 1

    def distances(self, activations: list[_Activation], at: Callable[[_Activation], fx.Node],
                  ahead: int) -> dict[int, int]:  # fmt: skip
        """Of each stretch's activations, by where they are read: how many stretches their copies have time for."""
        moved: dict[int, int] = defaultdict(int)
        for activation in activations:
            moved[self.of(at(activation))] += activation.num_bytes
        return {number: ahead * min(-(-n // self.chunk_bytes), MOST_CHUNKS) for number, n in moved.items()}


def _send(program: Program, activations: list[_Activation], ahead: int) -> list[tuple[_Activation, fx.Node]]:
    """Start copies where the forward is done with values, and wait for them later. Returns those that leave before the
    forward ends, with what they are on the host."""
    stretches, sent = _Stretches(program, "forward"), []
    distances = stretches.distances(activations, lambda activation: activation.last, ahead)
    for activation in activations:
        number = stretches.of(activation.last)
        due = number + 1 + distances[number]
        if due < len(stretches.waits):
            value, last = activation.value, activation.last
            host = program.emit(OFFLOAD, (value,), before=last.next, like=note(last), name=f"{value.name}_host")
            program.emit(DEPART, (value, host), before=stretches.waits[due] if distances[number] else host.next)
            sent.append((activation, host))
    return sent


def _bring_back(program: Program, sent: list[tuple[_Activation, fx.Node]], ahead: int) -> None:
    """Start copies ahead of the first readers in the backward, and wait for them there."""
    stretches = _Stretches(program, "backward")
    first = lambda activation: activation.readers[0]  # noqa: E731
    distances = stretches.distances([activation for activation, _ in sent], first, ahead)
    begin = next((node for node in program.computes if _computes_backward(node)), program.output)
    for activation, host in sorted(sent, key=lambda pair: stretches.order[first(pair[0])]):
        reader = first(activation)
        number = stretches.of(reader)
        point = reader
        if distances[number]:
            early = number - distances[number]
            point = stretches.waits[early] if early >= 0 else begin
        reload = program.emit(RELOAD, (host,), before=point)
        name = activation.value.name
        arrived = program.emit(ARRIVE, (reload, host), before=reader, like=note(reader), name=name)
        copies = {activation.value: arrived}
        for user in activation.readers:
            for value in user.all_input_nodes:
                if value is activation.value or value in activation.views:
                    again = program.view_again(value, activation.views, copies, before=user)
                    user.replace_input_with(value, again)


def _computes_backward(node: fx.Node) -> bool:
    return note(node).phase == "backward" and all(value.target is not TURN for value in node.all_input_nodes)
