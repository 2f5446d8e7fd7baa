"""What a checkpoint stores of chunks and training states: masters and moments, each process its own parts."""

from functools import partial

import torch
from torch import Tensor

from ..distributed.local_shards import Region
from ..kernels.split_pairs import SplitPair, join, split
from ..machine import Machine
from ..optimizer.states import ChunkState
from ..optimizer.updating_machine import UpdatingMachine
from .sharded import Stored


def master(machine: Machine, parameter: str) -> Stored:
    """A parameter's master."""
    layout, _ = machine.placing.store.layout.places[parameter]
    shape, regions = _lies(machine, parameter)
    if isinstance(machine, UpdatingMachine):
        state = machine.placing.states[layout.index]
        return Stored(shape, layout.master_dtype, regions, partial(_read, state), partial(_write, state))
    flat = machine.chunks[layout.index].master
    assert flat is not None
    return Stored.of(flat, shape, regions)


def moments(machine: UpdatingMachine, parameter: str) -> list[Stored]:
    """Its optimizer's state."""
    state, _ = machine.state_of(parameter)
    return [Stored.of(moment, *_lies(machine, parameter)) for moment in state.moments]


def _lies(machine: Machine, parameter: str) -> tuple[tuple[int, ...], tuple[Region, ...]]:
    """A parameter's whole shape, and what this process has of it."""
    store = machine.placing.store
    layout, number = store.layout.places[parameter]
    slot, held = layout.slots[number], None
    if isinstance(machine, UpdatingMachine) and layout.shards > 1:
        first = machine.zero.number(layout) * layout.shard_numel
        held = first, first + layout.shard_numel
    return store.parts.whole_shape(slot), store.parts.regions(slot, held)


def settle(machine: UpdatingMachine) -> None:
    """Let programs compute with masters that were set."""
    for chunk, state in zip(machine.chunks, machine.placing.states, strict=True):
        state.version += 1
        chunk.gathered = -1
        if chunk.resident is not None:
            machine.zero.own(chunk.resident, chunk.layout).copy_(state.weights)


def _read(state: ChunkState, region: Region) -> Tensor:
    weights = region.of(state.weights)
    if state.rest is None:
        return weights
    rest = region.of(state.rest)
    if not state.layout.splits:
        return rest
    return join(SplitPair(weights.to(rest.device).contiguous(), rest.contiguous()))


def _write(state: ChunkState, region: Region, inside: tuple[slice, ...], values: Tensor) -> None:
    weights = region.of(state.weights)[inside]
    if state.rest is None:
        weights.copy_(values)
        return
    rest = region.of(state.rest)[inside]
    if state.layout.splits:
        halves = split(values.to(weights.device, torch.float32))
        weights.copy_(halves.hi)
        rest.copy_(halves.lo)
    else:
        rest.copy_(values)
        weights.copy_(values)
