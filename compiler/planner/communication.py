"""What a plan's processes exchange in a step, counted from the program that will run, and the memory it takes."""

from collections import Counter

from torch import fx

from ...passes.program.estimate import CollectiveTraffic
from ...passes.program.plan import Plan
from ...passes.program.program import Program, tensor_type
from ...runtime.distributed.reduction import casts, piece_numel
from ...runtime.isa.instructions import (
    AVERAGE,
    BROADCAST,
    FETCH,
    REDUCE,
    START_ALL_GATHER,
    START_ALL_REDUCE,
    START_RECEIVE,
    START_REDUCE_SCATTER,
)
from ...runtime.isa.layout import ChunkLayout
from ...runtime.isa.mesh import names_of, taken_together
from ...runtime.isa.precision import sum_dtype

HELD = 2
"""Tensors that torch.distributed may still hold after their exchange: one per gloo thread."""


def collective_bytes(plan: Plan) -> int:
    """Device bytes that exchanging chunks takes beyond what the program holds: tensors that were exchanged but not
    released yet, and the temporary that 16-bit gradients are summed in."""
    held, temporaries = [0], [0]
    for chunk in plan.layout.chunks:
        if chunk.reduced_over and chunk.trainable:
            temporaries.append(_temporary_bytes(chunk, plan))
            held.append(temporaries[-1] or chunk.compute_bytes)
        if chunk.shards > 1:
            held.append(chunk.compute_bytes)
    return HELD * max(held) + max(temporaries)


def _temporary_bytes(chunk: ChunkLayout, plan: Plan) -> int:
    reduce_dtype = plan.request.reduce_dtype
    if not casts(chunk, reduce_dtype):
        return 0
    return piece_numel(chunk, scattered=chunk.shards > 1) * sum_dtype(chunk.dtype, reduce_dtype).itemsize


def collectives(program: Program, plan: Plan) -> tuple[CollectiveTraffic, ...]:
    """Bytes that each process receives, by axis and collective, with ring algorithms, which move least. Gradients count
    in the dtype that they are summed in: float32 for 16-bit gradients, unless the plan says otherwise."""
    if plan.mesh.size == 1:
        return ()
    counts: Counter[tuple[str, str]] = Counter()
    received: Counter[tuple[str, str]] = Counter()
    first = {int(fetch.args[0]): fetch for fetch in reversed(program.calls(FETCH))}
    for node in program.computes:
        if node.target is FETCH and plan.homes[node.args[0]].resident and node is not first[node.args[0]]:
            continue  # only the first fetch gathers a resident chunk
        found = traffic_of(node, plan)
        if found is not None:
            counts[found.axis, found.collective] += found.count
            received[found.axis, found.collective] += found.received_bytes
    # Several axes taken together come first: they are the replicas' axes, over which gradients are summed.
    order = {name: i for i, name in enumerate(names_of(plan.mesh.axes))}
    keys = sorted(counts, key=lambda key: (order.get(key[0], -1), key))
    return tuple(CollectiveTraffic(*key, counts[key], received[key]) for key in keys)


def traffic_of(node: fx.Node, plan: Plan) -> CollectiveTraffic | None:
    """What one instruction exchanges; None where that is nothing."""
    if node.target is START_ALL_GATHER:
        received_bytes = (node.args[2] - 1) * tensor_type(node.args[0]).num_bytes
        return CollectiveTraffic(node.args[1], "all-gather", 1, received_bytes)
    if node.target is START_REDUCE_SCATTER:
        received_bytes = (node.args[2] - 1) * tensor_type(node).num_bytes
        return CollectiveTraffic(node.args[1], "reduce-scatter", 1, received_bytes)
    if node.target is START_ALL_REDUCE:
        received_bytes = _all_reduced(tensor_type(node).num_bytes, plan.mesh.ranks_over((node.args[1],)))
        return CollectiveTraffic(node.args[1], "all-reduce", 1, received_bytes)
    if plan.batches > 1 and node.target in (AVERAGE, BROADCAST):
        together, num_bytes = taken_together(names_of(plan.mesh.batch_axes)), tensor_type(node).num_bytes
        if node.target is BROADCAST:
            return CollectiveTraffic(together, "broadcast", 1, num_bytes)
        return CollectiveTraffic(together, "all-reduce", 1, _all_reduced(num_bytes, plan.batches))
    if node.target is START_RECEIVE:
        axis = taken_together(names_of(plan.mesh.pipeline_axes))
        return CollectiveTraffic(axis, "receive", 1, tensor_type(node).num_bytes)
    if node.target is REDUCE:
        return reduced(plan.layout.chunks[node.args[1]], plan)
    return gathered(plan.layout.chunks[node.args[0]]) if node.target is FETCH else None


def gathered(chunk: ChunkLayout) -> CollectiveTraffic | None:
    """The all-gather of a chunk's weights; None where the chunk is not sharded."""
    if chunk.shards == 1:
        return None
    return CollectiveTraffic(
        taken_together(chunk.reduced_over), "all-gather", 1, chunk.compute_bytes - chunk.shard_bytes
    )


def reduced(chunk: ChunkLayout, plan: Plan) -> CollectiveTraffic | None:
    """The reduction of a chunk's gradient; None where it is not summed over processes."""
    if not chunk.reduced_over:
        return None
    together, ranks = taken_together(chunk.reduced_over), plan.mesh.ranks_over(chunk.reduced_over)
    reduce_dtype = plan.request.reduce_dtype
    num_bytes = chunk.numel * sum_dtype(chunk.dtype, reduce_dtype).itemsize
    scatters = chunk.shards > 1
    pieces = -(-chunk.numel // piece_numel(chunk, scattered=scatters)) if casts(chunk, reduce_dtype) else 1
    if scatters:
        return CollectiveTraffic(together, "reduce-scatter", pieces, num_bytes * (ranks - 1) // ranks)
    return CollectiveTraffic(together, "all-reduce", pieces, _all_reduced(num_bytes, ranks))


def _all_reduced(num_bytes: int, ranks: int) -> int:
    return 2 * num_bytes * (ranks - 1) // ranks
