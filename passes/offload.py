"""Keep activations of chosen blocks on the host from their last reader in the forward to their first in the backward.

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

A block's activations are the forward values that its backward reads: the inputs of a recomputed block, everything that
any other block saves. Views of them are made again in the backward. Some values stay on the device: small ones, outputs
of the program, those that an operator overwrites, and those that would depart only as the forward ends.

For a batch that runs in rounds, the activations of each round wait for its own backward. The gradient sums that the
plan names wait on the host too, from one round's backward to the next.

Copies overlap with the compute of as many chunks as they have bytes, at most MOST_CHUNKS, times the plan's `prefetch`;
with a `prefetch` of 0 they are waited for at once.
"""

from bisect import bisect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
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
    ROUND_SWEEPS,
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
from .splitting.parts import block_finder

SMALLEST_BYTES = 2**20
"""Smaller values stay on the device: copying them would not reach the bus's bandwidth and would save little."""

MOST_CHUNKS = 4
"""The largest factor on `prefetch`: while a copy runs, the value still takes device memory."""


@graph_pass(requires=(chunked,), gives=(offloaded,))
def offload(program: Program, plan: Plan) -> None:
    if not program.calls(TURN) or not (plan.offload or plan.offload_sums):
        return
    sweeps = _sweeps(program)
    for there, back in zip(sweeps[::2], sweeps[1::2], strict=True) if plan.offload else ():
        activations = _activations(program, plan.offload, there, back)
        _bring_back(program, _send(program, activations, (there,), plan.prefetch), back, plan.prefetch)
    for there, then, back in zip(sweeps[1::2], sweeps[2::2], sweeps[3::2], strict=False) if plan.offload_sums else ():
        sums = _sums(program, plan, there, back)
        _bring_back(program, _send(program, sums, (there, then), plan.prefetch), back, plan.prefetch)


def _sweeps(program: Program) -> list[str]:
    """The program's sweeps, forward and backward alternating."""
    found = dict.fromkeys(note(node).sweep for node in program.computes)
    return [sweep for sweep in found if sweep.startswith(ROUND_SWEEPS)] or ["forward", "backward"]


@dataclass(frozen=True)
class _Activation:
    """A value of one sweep, or a sum of gradients, that a later sweep reads. `last` is the last node of its own sweep
    that makes, views or reads it; `readers` are those in the later sweep, in order; `views` share its storage."""

    value: fx.Node
    views: set[fx.Node]
    last: fx.Node
    readers: list[fx.Node]

    @property
    def num_bytes(self) -> int:
        return tensor_type(self.value).num_bytes


# -- which -------------------------------------------------------------------------------------------------


def _activations(program: Program, blocks: tuple[str, ...], there: str, back: str) -> list[_Activation]:
    """The activations of `blocks`, made in the sweep `there` and read in `back`, in the order of their last readers.
    Values that any other sweep reads stay on the device."""
    order, found = program.positions(), []
    for value, names in _storages(program, there).items():
        users = sorted({user for name in names for user in name.users}, key=order.__getitem__)
        readers = [user for user in users if note(user).sweep == back]
        if _is_large(value) and any(belongs(reader, block) for reader in readers for block in blocks):
            before = [user for user in users if note(user).sweep == there]
            last = max([*names, *before], key=order.__getitem__)
            if len(before) + len(readers) == len(users):
                found.append(_Activation(value, names - {value}, last, readers))
    return sorted(found, key=lambda activation: order[activation.last])


def _sums(program: Program, plan: Plan, there: str, back: str) -> list[_Activation]:
    """The gradient sums that the backward `back` adds to those of the backward `there`, in the order in which they are
    complete."""
    block_of, found = block_finder(plan.blocks), []
    for reader in program.calls(torch.ops.aten.add_.Tensor):
        total = reader.args[0]
        if (note(total).sweep, note(reader).sweep) != (there, back) or not _is_large(total):
            continue
        if block_of(note(total).module) in plan.offload_sums:
            found.append(_Activation(total, set(), total, [reader]))
    order = program.positions()
    return sorted(found, key=lambda activation: order[activation.last])


def _is_large(value: fx.Node) -> bool:
    """Whether a value is a large enough tensor that fills its storage without gaps or overlaps."""
    kind = type_of(value)
    if not isinstance(kind, TensorType) or kind.num_bytes < SMALLEST_BYTES:
        return False
    return kind.num_bytes == prod(kind.shape) * kind.dtype.itemsize


def _storages(program: Program, there: str) -> dict[fx.Node, set[fx.Node]]:
    """The values of a sweep that own a storage, each with all nodes that share it. Storages that must not be moved are
    left out."""
    holder: dict[fx.Node, fx.Node] = {node: node for node in program.placeholders}
    names: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    fixed = {program.output, *program.placeholders}
    elements: dict[tuple[fx.Node, object], fx.Node] = {}
    for node in program.computes:
        fixed.update(holder[value] for value in overwritten_inputs(node) if value in holder)
        if note(node).sweep != there:
            holder[node] = node
            fixed.add(node)
            continue
        # Only its finish refers to the buffer that a collective or a message fills.
        has_come = node.target in (FINISH_COLLECTIVE, FINISH_RECEIVE)
        sources = [] if has_come else [holder[value] for value in aliased_inputs(node)]
        if sources and isinstance(type_of(sources[0]), tuple):  # one of several results, each with a storage of its own
            sources = [elements.setdefault((sources[0], node.args[1]), node)]
        if len(set(sources)) > 1 or node.target in PER_CHUNK:
            fixed.update([node, *sources])
        holder[node] = sources[0] if sources else node
        names[holder[node]].add(node)
    fixed.update(holder[value] for value in program.output.all_input_nodes if value in holder)
    return {value: found for value, found in names.items() if value not in fixed}


# -- where -------------------------------------------------------------------------------------------------


class _Stretches:
    """Divides sweeps at their chunk waits: each stretch, from one wait to the next, has something to compute."""

    def __init__(self, program: Program, sweeps: tuple[str, ...]) -> None:
        self.waits = [node for node in program.calls(WAIT) if note(node).sweep in sweeps]
        self.order = program.positions()
        self.chunk_bytes = max((tensor_type(node).num_bytes for node in program.calls(FETCH)), default=1)

    def of(self, node: fx.Node) -> int:
        """The index of the stretch that a node is in; -1 before the first."""
        return bisect([self.order[wait] for wait in self.waits], self.order[node]) - 1

    def distances(self, activations: list[_Activation], at: Callable[[_Activation], fx.Node],
                  ahead: int) -> dict[int, int]:  # fmt: skip
        """For each stretch, how many stretches the copies of the activations with `at(activation)` in it may take."""
        moved: dict[int, int] = defaultdict(int)
        for activation in activations:
            moved[self.of(at(activation))] += activation.num_bytes
        return {number: ahead * min(-(-n // self.chunk_bytes), MOST_CHUNKS) for number, n in moved.items()}


def _send(program: Program, activations: list[_Activation], sweeps: tuple[str, ...],
          ahead: int) -> list[tuple[_Activation, fx.Node]]:  # fmt: skip
    """Start copies after the last readers in `sweeps`, and wait for them later. Returns the activations that depart
    before the sweeps end, each with the node of its host copy."""
    stretches, sent = _Stretches(program, sweeps), []
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


def _bring_back(program: Program, sent: list[tuple[_Activation, fx.Node]], back: str, ahead: int) -> None:
    """Start copies back before the first readers in the sweep `back`, and wait for them there."""
    stretches = _Stretches(program, (back,))
    first = lambda activation: activation.readers[0]  # noqa: E731
    distances = stretches.distances([activation for activation, _ in sent], first, ahead)
    begin = next((node for node in program.computes if _computes(node, back)), program.output)
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


def _computes(node: fx.Node, sweep: str) -> bool:
    return note(node).sweep == sweep and all(value.target is not TURN for value in node.all_input_nodes)
