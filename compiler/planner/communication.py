"""What the processes of a plan exchange in a step, counted from the program that will run."""

from collections import Counter
from collections.abc import Iterator

from torch import fx

from ...passes.program.plan import Exchange, Plan
from ...passes.program.program import Program, tensor_type
from ...runtime.isa.instructions import AVERAGE, FETCH, REDUCE, START_ALL_GATHER, START_ALL_REDUCE, START_REDUCE_SCATTER
from ...runtime.isa.layout import ChunkLayout
from ...runtime.isa.mesh import names_of, taken_together


def exchanges(program: Program, plan: Plan) -> tuple[Exchange, ...]:
    """Bytes that each process receives, by axis and collective, with the algorithms that move least: rings."""
    counts: Counter[tuple[str, str]] = Counter()
    received: Counter[tuple[str, str]] = Counter()
    sizes = {axis.name: axis.size for axis in plan.mesh.axes}
    first = {int(fetch.args[0]): fetch for fetch in reversed(program.calls(FETCH))}
    for node in program.computes:
        if node.target is FETCH and node.args[0] in plan.residency.weights and node is not first[node.args[0]]:
            continue  # whole from its first use on
        for axis, collective, num_bytes in _received(node, plan, sizes):
            counts[axis, collective] += 1
            received[axis, collective] += num_bytes
    # Several axes taken together come first: they are the replicas', over which gradients are summed.
    order = {name: i for i, name in enumerate(names_of(plan.mesh.axes))}
    found = sorted(counts, key=lambda key: (order.get(key[0], -1), key))
    return tuple(Exchange(*key, counts[key], received[key]) for key in found)


def _received(node: fx.Node, plan: Plan, sizes: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    if node.target is START_ALL_GATHER:
        yield node.args[1], "all-gather", (node.args[2] - 1) * tensor_type(node.args[0]).num_bytes
    elif node.target is START_REDUCE_SCATTER:
        yield node.args[1], "reduce-scatter", (node.args[2] - 1) * tensor_type(node).num_bytes
    elif node.target is START_ALL_REDUCE:
        yield node.args[1], "all-reduce", _all_reduced(tensor_type(node).num_bytes, sizes[node.args[1]])
    elif plan.batches > 1 and node.target is AVERAGE:
        together = taken_together(names_of(plan.mesh.batch_axes))
        yield together, "all-reduce", _all_reduced(tensor_type(node).num_bytes, plan.batches)
    elif node.target is REDUCE:
        yield from _reduced(plan.layout.chunks[node.args[1]], tensor_type(node.args[0]).num_bytes, plan)
    elif node.target is FETCH:
        chunk = plan.layout.chunks[node.args[0]]
        if chunk.shards > 1:
            yield taken_together(chunk.reduced_over), "all-gather", chunk.compute_bytes - chunk.shard_bytes


def _reduced(chunk: ChunkLayout, num_bytes: int, plan: Plan) -> Iterator[tuple[str, str, int]]:
    """What becomes of a chunk's gradient."""
    together, ranks = taken_together(chunk.reduced_over), plan.mesh.ranks_over(chunk.reduced_over)
    if plan.zero > 1 and chunk.shards > 1:
        yield together, "reduce-scatter", num_bytes * (ranks - 1) // ranks
    elif ranks > 1:
        yield together, "all-reduce", _all_reduced(num_bytes, ranks)


def _all_reduced(num_bytes: int, ranks: int) -> int:
    return 2 * num_bytes * (ranks - 1) // ranks
