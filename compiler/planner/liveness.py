"""Device bytes at every point of a program, by category and exact liveness, and the most that it keeps on the host.

A value's storage lives from the operator that makes it to the last reader of any of its names; views share their
storage. What a program hands to the caller at its turn is assumed to live to the program's end, and on until the turn
of the next call, as with `out = model(...)` in a loop. Tests compare the result with measurements: planned is never
below measured.
"""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from torch import fx

from ...passes.program.program import Program, aliased_inputs, note, tensor_type, type_of
from ...runtime.isa.instructions import FETCH, GRADIENTS, OFFLOAD, TURN
from ...runtime.isa.linear_cross_entropy import BACKWARD, FORWARD, backward_workspace_bytes, forward_workspace_bytes
from ...runtime.isa.quantized import DEQUANTIZE, workspace_bytes
from .storages import storage_bytes, tensors_of

ACTIVATIONS, GRADIENT_BUFFERS, OUTPUTS = "activations", "gradients on their way", "outputs"


@dataclass(frozen=True)
class Interval:
    """A chunk's weights on the device, from its fetch to its release (positions, both inclusive)."""

    chunk: int
    start: int
    end: int


@dataclass(frozen=True)
class Liveness:
    """Live bytes at each position of a program.

    `values` maps a category to an array of bytes by position. The chunks' weights are not in it, since they depend on
    residency; `fetches` has them instead. `static_bytes` are inputs, buffers and constants. `largest` is, by position,
    the largest single storage among the values made there, which an allocator must find in one piece. (It leaves out
    memory inside operators, which they take in small pieces, and weights, since a chunk fits where another one was.)
    `on_host` is, by position, what activations take on the host.
    """

    values: dict[str, np.ndarray]
    fetches: tuple[Interval, ...]
    static_bytes: int
    length: int
    largest: np.ndarray
    on_host: np.ndarray

    @property
    def largest_bytes(self) -> int:
        """The largest single storage among the values."""
        return int(self.largest.max(initial=0))

    @property
    def offloaded_bytes(self) -> int:
        """The most that activations take on the host."""
        return int(self.on_host.max(initial=0))

    @property
    def activation_bytes(self) -> int:
        """The most that activations take."""
        return int(self.values[ACTIVATIONS].max(initial=0))

    def total(self) -> np.ndarray:
        return sum(self.values.values(), np.zeros(self.length, dtype=np.int64))


def analyse(program: Program) -> Liveness:
    """Liveness of a lowered program, before its compute is clustered into functions."""
    nodes = program.nodes
    storages = _Storages(program)
    spans = storages.spans(nodes)
    # Changes by position, in lists: numpy takes many times longer for single elements.
    values = {name: [0] * (len(nodes) + 1) for name in (ACTIVATIONS, GRADIENT_BUFFERS, OUTPUTS)}
    fetches, largest, on_host = [], [0] * len(nodes), [0] * (len(nodes) + 1)
    for storage, (start, end) in spans.items():
        origin = storages.origin[storage]
        if origin.op == "call_function" and origin.target is FETCH:
            fetches.append(Interval(int(origin.args[0]), start, end))
            continue
        size = storages.sizes[storage]
        if origin.target is OFFLOAD:
            on_host[start] += size
            on_host[end + 1] -= size
            continue
        largest[start] = max(largest[start], size)
        category = GRADIENT_BUFFERS if origin.target is GRADIENTS else ACTIVATIONS
        category = OUTPUTS if storage in storages.handed_out else category
        values[category][start] += size
        values[category][end + 1] -= size
    for i, node in enumerate(nodes):
        if workspace_bytes := _workspace_bytes(node, program):
            values[ACTIVATIONS][i] += workspace_bytes
            values[ACTIVATIONS][i + 1] -= workspace_bytes
    turn = next((i for i, node in enumerate(nodes) if node.target is TURN), len(nodes) - 1)
    held = sum(storages.sizes[storage] for storage in storages.handed_out)
    values[OUTPUTS][0] += held
    values[OUTPUTS][turn + 1] -= held
    return Liveness(
        {name: _cumulated(changes) for name, changes in values.items()}, tuple(fetches), storages.static_bytes,
        len(nodes), np.array(largest, dtype=np.int64), _cumulated(on_host),
    )  # fmt: skip


def _cumulated(changes: list[int]) -> np.ndarray:
    """What the changes up to each position add up to; the last one is behind the program."""
    return np.array(changes, dtype=np.int64).cumsum()[:-1]


def _workspace_bytes(node: fx.Node, program: Program) -> int:
    """Memory inside an operator while it runs, beyond its results."""
    if node.op == "call_module":
        return _inside_bytes(program.functions[str(node.target)])
    if node.target is FORWARD:
        hidden, weight = map(tensor_type, node.args[:2])
        return forward_workspace_bytes(hidden.shape[0], weight.shape[0], node.args[-1], hidden.dtype)
    if node.target is BACKWARD:
        hidden, weight = map(tensor_type, node.args[1:3])
        chunk, softcap = min(node.args[-2], weight.shape[0]), node.args[8]
        return backward_workspace_bytes(hidden.shape, chunk, hidden.dtype, softcap)
    if node.target is DEQUANTIZE:
        return workspace_bytes(str(node.args[2]), tensor_type(node).shape)
    return 0


def _inside_bytes(function: Program) -> int:
    """What the operators of a fused function would take besides its results, one by one: its kernels take no more."""
    found = analyse(function)
    return int((found.total() - found.values[OUTPUTS]).max(initial=0))


class _Storages:
    """The storages that each node's value refers to. The key of a storage is its maker and the number of the result."""

    def __init__(self, program: Program) -> None:
        self.held: dict[fx.Node, list[Hashable]] = defaultdict(list)
        self.sizes: dict[Hashable, int] = {}
        self.origin: dict[Hashable, fx.Node] = {}
        self.handed_out: set[Hashable] = set()
        self.static_bytes = 0
        for node in program.graph.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.static_bytes += self._bytes_of(node)
        elif node.op == "output" or node.target is TURN:
            self.handed_out.update(s for value in node.all_input_nodes for s in self.held[value])
        if node.op not in ("call_function", "call_module"):
            return
        sources = list(aliased_inputs(node))
        if note(node).type is None:
            return
        if sources and getattr(node.target, "__name__", "") == "getitem":
            held, element = self.held[sources[0]], (sources[0], node.args[1])
            # A result that was made has its own storage; the pieces of a split share the storage of what was split.
            self.held[node] = [element] if element in held else list(held)
        elif sources:
            self.held[node] = [s for source in sources for s in self.held[source]]
        else:
            held = self.held[node]
            for i, num_bytes in enumerate(storage_bytes(node, self._bytes_of)):
                storage = node, i
                held.append(storage)
                self.sizes[storage], self.origin[storage] = num_bytes, node

    def _bytes_of(self, node: fx.Node) -> int:
        """Bytes of the storages behind a value; for an input, whose storage is unknown, of the value itself."""
        held = self.held[node]
        return sum(self.sizes[s] for s in held) if held else sum(t.num_bytes for t in tensors_of(type_of(node)))

    def spans(self, nodes: list[fx.Node]) -> dict[Hashable, tuple[int, int]]:
        order = {node: i for i, node in enumerate(nodes)}
        spans: dict[Hashable, tuple[int, int]] = {}
        for node, held in self.held.items():
            if not held:
                continue
            here = order[node]
            end = max(map(order.__getitem__, node.users), default=here)
            for storage in held:
                start, last = spans.get(storage, (here, 0))
                spans[storage] = start, len(nodes) - 1 if storage in self.handed_out else max(last, end)
        return spans
