"""What the processes of a plan exchange in a step, counted from the program that will run."""

from collections import Counter
from collections.abc import Iterator

from torch import fx

from ...passes.program.plan import Exchange, Plan
from ...passes.program.program import Program, tensor_type
from ...runtime.isa.instructions import AVERAGE, FETCH, REDUCE, START_ALL_GATHER, START_ALL_REDUCE, START_REDUCE_SCATTER
from ...runtime.isa.mesh import DATA


def exchanges(program: Program, plan: Plan) -> tuple[Exchange, ...]:
    """Bytes that each process receives, by axis and collective, with the algorithms that move least: rings."""
    counts: Counter[tuple[str, str]] = Counter()
    received: Counter[tuple[str, str]] = Counter()
    sizes = {axis.name: axis.size for axis in plan.mesh.axes}
    first = {int(fetch.args[0]): fetch for fetch in reversed(program.calls(FETCH))}
    for node in program.computes:
        if node.target is FETCH and plan.homes[node.args[0]].resident and node is not first[node.args[0]]:
            continue  # whole from its first use on
        for axis, collective, num_bytes in _received(node, plan, sizes):
            counts[axis, collective] += 1
            received[axis, collective] += num_bytes
    order = {plan.mesh.replica_name: -1} | {axis.name: i for i, axis in enumerate(plan.mesh.axes)}
    found = sorted(counts, key=lambda key: (order[key[0]], key[1]))
    return tuple(Exchange(*key, counts[key], received[key]) for key in found)


def _received(node: fx.Node, plan: Plan, sizes: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    replicas, together = plan.mesh.replicas, plan.mesh.replica_name
    if node.target is START_ALL_GATHER:
        yield node.args[1], "all-gather", (node.args[2] - 1) * tensor_type(node.args[0]).num_bytes
    elif node.target is START_REDUCE_SCATTER:
        yield node.args[1], "reduce-scatter", (node.args[2] - 1) * tensor_type(node).num_bytes
    elif node.target is START_ALL_REDUCE:
        yield node.args[1], "all-reduce", _all_reduced(tensor_type(node).num_bytes, sizes[node.args[1]])
    elif plan.batches > 1 and node.target is AVERAGE:
        yield DATA, "all-reduce", _all_reduced(tensor_type(node).num_bytes, plan.batches)
    elif replicas > 1 and node.target is REDUCE:
        num_bytes = tensor_type(node.args[0]).num_bytes
        if plan.zero > 1 and plan.layout.chunks[node.args[1]].shards > 1:
            yield together, "reduce-scatter", num_bytes * (replicas - 1) // replicas
        else:
            yield together, "all-reduce", _all_reduced(num_bytes, replicas)
    elif node.target is FETCH:
        chunk = plan.layout.chunks[node.args[0]]
        if chunk.shards > 1:
            yield together, "all-gather", chunk.compute_bytes - chunk.shard_bytes


def _all_reduced(num_bytes: int, ranks: int) -> int:
    return 2 * num_bytes * (ranks - 1) // ranks
