"""Runs a sharded program on every rank of its mesh at once, in one process: node by node, all ranks in step."""

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from geminifx.passes.program.program import Program, note
from geminifx.runtime.isa.instructions import (
    ALL_GATHER,
    ALL_REDUCE,
    COLLECTIVES,
    FINISH_COLLECTIVE,
    FORK_RNG,
    LOCAL,
    OFFSET,
    REDUCE_SCATTER,
    SAVE_RNG,
    START_ALL_GATHER,
    START_ALL_REDUCE,
    STARTS,
    SWAP_RNG,
    TURN,
)
from geminifx.runtime.isa.mesh import (
    PARTIAL,
    REPLICATE,
    Axis,
    Mesh,
    Placements,
    join_shards,
    local_shard,
    parse_placements,
    take_shard,
)
from geminifx.runtime.kernels.random_state import fork
from torch import Tensor, fx

Values = dict[str, Tensor]


def run_whole(program: Program, values: Values) -> Values:
    """The results of an unsharded program by role."""
    return {role: found[0] for role, found in run_on_all(program, Mesh(), values).items()}


def run_on_all(program: Program, mesh: Mesh, values: Values) -> dict[str, list[Tensor]]:
    """Results by role, of all ranks, for whole inputs by role."""
    parts = {
        note(node).role: [
            local_shard(values[note(node).role], placements_of(node, mesh), mesh, rank).clone()
            for rank in range(mesh.size)
        ]
        for node in program.placeholders
    }
    for role in values.keys() - parts.keys():  # what comes in at the turn
        parts[role] = [values[role].clone() for _ in range(mesh.size)]
    return run_parts(program, mesh, parts)


def run_parts(program: Program, mesh: Mesh, parts: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Results by role, of all ranks, for every rank's part of the inputs by role."""
    ranks = range(mesh.size)
    found: dict[fx.Node, list[Any]] = {}
    generators = [torch.get_rng_state()] * mesh.size  # ranks that share a batch are seeded alike
    outputs: dict[str, list[Tensor]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = parts[note(node).role]
        elif node.target is TURN:
            found[node] = [[parts[f"tangent:{i}"][rank] for i in node.args[1]] for rank in ranks]
            outputs = {f"output:{i}": found[value] for i, value in enumerate(node.args[0])}
        elif node.op == "call_function":
            args = [fx.map_arg(node.args, lambda value, rank=rank: found[value][rank]) for rank in ranks]
            kwargs = [fx.map_arg(node.kwargs, lambda value, rank=rank: found[value][rank]) for rank in ranks]
            found[node] = _run(node.target, args, kwargs, mesh, generators)
    assert all(torch.equal(state, generators[0]) for state in generators), "ranks would draw apart from here on"
    return outputs | {role: found[node] for role, node in program.results.items()}


def scatter(whole: Tensor, placements: Placements, axes: tuple[Axis, ...]) -> list[Tensor]:
    """Every rank's part of a tensor; of one that is partial the parts are terms, all of them different."""
    if not axes:
        return [whole.clone()]
    size, placement = axes[0].size, placements[0]
    if placement == PARTIAL:
        terms = [torch.full_like(whole, 1 + place) for place in range(size - 1)]
        mine = [*terms, whole - sum(terms)]
    else:
        mine = [take_shard(whole, placement, place, size) for place in range(size)]
    return [part for one in mine for part in scatter(one, placements[1:], axes[1:])]


def assemble(parts: list[Tensor], placements: Placements, axes: tuple[Axis, ...]) -> Tensor:
    """The tensor of all ranks' parts. Fails where replicas differ."""
    if not axes:
        return parts[0]
    below = len(parts) // axes[0].size
    groups = [parts[i : i + below] for i in range(0, len(parts), below)]
    mine = [assemble(group, placements[1:], axes[1:]) for group in groups]
    if placements[0] == PARTIAL:
        return torch.stack(mine).sum(0)
    if placements[0] == REPLICATE:
        for other in mine[1:]:
            assert torch.equal(other, mine[0]), "replicas differ"
    return join_shards(mine, placements[0])


def placements_of(node: fx.Node, mesh: Mesh) -> Placements:
    return parse_placements(note(node).placement or "R", mesh.tensor_axes)


def _run(target: Any, args: list[Any], kwargs: list[Any], mesh: Mesh, generators: list[Tensor]) -> list[Any]:
    if target in COLLECTIVES:
        return _collective(target, args, mesh)
    if target in STARTS:
        return _start(target, args, mesh)
    if target is FINISH_COLLECTIVE:
        return [_finish(*a) for a in args]
    if target is LOCAL:
        return [_part(a[0], a[1], mesh.coordinate(rank, a[2]), a[3]) for rank, a in enumerate(args)]
    if target is OFFSET:
        return [torch.tensor(mesh.coordinate(rank, a[1]) * a[2]) for rank, a in enumerate(args)]
    call, results = CALLED.get(target, target), []
    for rank, (a, k) in enumerate(zip(args, kwargs, strict=True)):
        torch.set_rng_state(generators[rank])
        if target is FORK_RNG:
            results.append(fork(torch.device("cpu"), tuple(mesh.coordinate(rank, axis) for axis in a[1])))
        else:
            results.append(call(*a, **k))
        generators[rank] = torch.get_rng_state()
    return results


def _swap(state: Tensor) -> None:
    current = torch.get_rng_state()
    torch.set_rng_state(state)
    state.copy_(current)


CALLED: dict[Any, Any] = {
    operator.getitem: lambda source, place: source[place], SAVE_RNG: lambda like: torch.get_rng_state(),
    SWAP_RNG: _swap,
}  # fmt: skip
"""What runs for an operator that is not torch's to run."""


@dataclass(frozen=True)
class Pending:
    """What a collective under way fills: no tensor, so that whoever reads it fails."""

    filled: Tensor
    value: Tensor
    sent: Tensor


def _start(target: Any, args: list[Any], mesh: Mesh) -> list[Pending]:
    """What a sum overwrites is made unreadable, too; what is sent must stay as it is."""
    assert all(part.is_contiguous() for part, *_ in args)
    if target is START_ALL_REDUCE:
        values = _collective(ALL_REDUCE, args, mesh)
        filled = [part.fill_(float("nan") if part.is_floating_point() else -1) for part, *_ in args]
    else:
        whole = ALL_GATHER if target is START_ALL_GATHER else REDUCE_SCATTER
        values = _collective(whole, [(part, 0, *rest) for part, *rest in args], mesh)
        filled = [torch.empty_like(value) for value in values]
    sent = (part.clone() for part, *_ in args)
    return [Pending(*found) for found in zip(filled, values, sent, strict=True)]


def _finish(pending: Pending, part: Tensor | None = None) -> Tensor:
    assert part is None or torch.equal(part, pending.sent), "what is sent was overwritten on its way"
    return pending.filled.copy_(pending.value)


def _collective(target: Any, args: list[Any], mesh: Mesh) -> list[Tensor]:
    axis = args[0][1] if target is ALL_REDUCE else args[0][2]
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in range(mesh.size):
        others = tuple(mesh.coordinate(rank, a.name) for a in mesh.axes if a.name != axis)
        groups[others].append(rank)
    results: list[Any] = [None] * mesh.size
    for group in groups.values():
        parts = [args[rank][0] for rank in group]
        for place, rank in enumerate(group):
            results[rank] = _reduced(target, parts, args[rank], place)
    return results


def _reduced(target: Any, parts: list[Tensor], args: Any, place: int) -> Tensor:
    if target is ALL_GATHER:
        return torch.cat(parts, args[1]).contiguous()
    together = torch.stack(parts)
    if target is ALL_REDUCE:
        return together.amax(0) if args[2] == "max" else together.sum(0)
    return _part(together.sum(0), args[1], place, args[3])


def _part(whole: Tensor, dim: int, place: int, size: int) -> Tensor:
    return whole.chunk(size, dim)[place].contiguous()
