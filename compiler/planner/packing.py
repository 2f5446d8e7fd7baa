"""Packs parameters into chunks, in order of first use."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import nn

from ...passes.program.program import Program, note, tensor_type
from ...runtime.isa.errors import StateError
from ...runtime.isa.layout import ChunkLayout, Layout, Owners, Rule, Slot, alignment
from ...runtime.isa.mesh import ONE_PROCESS, Mesh, sharded_over
from ...runtime.isa.precision import master_dtype

LARGEST_CHUNK_BYTES = 256 * 2**20
"""Copies reach the bus's full rate from 16 MiB; larger chunks only hold more of the device while in use."""

SMALLEST_CHUNK_BYTES = 32 * 2**10


_Kind = tuple[torch.dtype, torch.dtype, bool, frozenset[str], Owners, Rule]
"""What all parameters of a chunk have in common: compute dtype, master dtype, trainability, the axes that they are
sharded over (and hence those that their gradients are summed over), the pipeline ranks that have them, and the rule
that they are updated by."""


@dataclass(frozen=True)
class Spread:
    """The mesh that a model is spread over, and, in a pipeline, the ranks that have each parameter."""

    mesh: Mesh = ONE_PROCESS
    owners: Mapping[str, Owners] = field(default_factory=dict)


@dataclass(frozen=True)
class Together:
    """What is updated together: `unit` elements at a time, or more for the parameters that `rules` name."""

    unit: int = 1
    rules: Mapping[str, Rule] = field(default_factory=dict)

    def rule_of(self, name: str, parameter: nn.Parameter) -> Rule:
        return self.rules.get(name, "elements") if parameter.requires_grad else "elements"


@dataclass
class _Open:
    """A chunk that still takes parameters."""

    slots: list[Slot] = field(default_factory=list)
    numel: int = 0


@dataclass(frozen=True)
class Use:
    """A parameter that a program reads: its shape and placement, and the parameter whose storage it shares, or ""."""

    shape: tuple[int, ...]
    placement: str = ""
    tied: str = ""


def uses(program: Program) -> dict[str, Use]:
    """The parameters that a program reads, in order of first use; those that are tied to another come last."""
    order, inputs = program.positions(), program.inputs("parameter")
    found = {name: Use(tuple(tensor_type(node).shape), note(node).placement, note(node).tied)
             for name, node in inputs.items()}  # fmt: skip
    first: dict[str, int] = {}
    for name, node in inputs.items():
        use = min((order[user] for user in node.users), default=len(order))
        owner = found[name].tied or name
        first[owner] = min(first.get(owner, use), use)
    owners = sorted(first, key=first.__getitem__)
    return {name: found[name] for name in [*owners, *(name for name, use in found.items() if use.tied)]}


def pack(
    used: Mapping[str, Use],
    parameters: Mapping[str, nn.Parameter],
    blocks: tuple[str, ...],
    dtypes: Mapping[str, torch.dtype],
    spread: Spread = Spread(),  # safe as a default: it is frozen
    together: Together = Together(),
) -> Layout:
    """The layout of a captured model's `parameters`, of which those that are `used` are packed; in a pipeline these are
    one process's.

    The parameters of a chunk agree in compute dtype, master dtype, trainability, the mesh axes that they are sharded
    over and that their gradients are summed over, the pipeline ranks that have them, and the rule that they are updated
    by. Chunks follow the model's blocks: a chunk is as large as the largest block, within fixed bounds, and at the
    beginning of a block all chunks are closed if together they hold at least half of that. Equal blocks thus have equal
    chunks, and equal programs. A parameter that is larger than a chunk gets one of its own. No two parameters share a
    unit of elements that are updated together.
    """
    unit = together.unit
    limit_bytes = _chunk_bytes({name: use for name, use in used.items() if name in parameters}, blocks, dtypes, unit)
    opened: dict[_Kind, _Open] = defaultdict(_Open)
    closed: list[tuple[_Kind, _Open]] = []
    inside = ""
    for name, use in ((name, use) for name, use in used.items() if name in parameters and not use.tied):
        parameter, previous, inside = parameters[name], inside, _block_of(name, blocks)
        if inside != previous and sum(c.numel * key[0].itemsize for key, c in opened.items()) >= limit_bytes // 2:
            closed += opened.items()
            opened.clear()
        shape, placement = use.shape, use.placement
        key = (
            dtypes[name], master_dtype(parameter), parameter.requires_grad, sharded_over(placement),
            spread.owners.get(name, ()), together.rule_of(name, parameter),
        )  # fmt: skip
        apart = alignment(key[0], unit)
        size = -(-prod(shape) // apart) * apart
        current = opened[key]
        if current.slots and (current.numel + size) * key[0].itemsize > limit_bytes:
            closed.append((key, opened.pop(key)))
            current = opened[key]
        current.slots.append(Slot(name, current.numel, shape, placement))
        current.numel += size
    closed += opened.items()
    chunks = []
    for i, (key, made) in enumerate(closed):
        axes = spread.mesh.reduction_axes(made.slots[0].placement)
        chunks.append(ChunkLayout(i, made.numel, *key[:3], tuple(made.slots), reduced_over=axes, rule=key[5]))
    tied = tuple((name, use.tied) for name, use in used.items() if use.tied)
    return Layout(tuple(chunks), tied, tuple(spread.owners.items()))


def thawed(
    layout: Layout, names: Collection[str], parameters: Mapping[str, nn.Parameter], rules: Mapping[str, Rule]
) -> Layout:
    """The layout with all chunks trained that hold one of the parameters `names`, which were frozen. Chunks are trained
    as a whole: they keep their other parameters, and states for these, too.

    Raises StateError for a chunk whose parameters would be updated by different `rules`.
    """
    chunks = []
    for chunk in layout.chunks:
        trained = [slot.name for slot in chunk.slots if slot.name in names]
        if trained and not chunk.trainable:
            found = sorted({rules.get(slot.name, "elements") for slot in chunk.slots})
            if len(found) > 1:
                raise StateError(
                    f"parameter {trained[0]} is trained now and was frozen when the model was planned, in a chunk with "
                    f"parameters that the optimizer updates by different rules ({', '.join(found)}); save "
                    "a checkpoint, compile the model again with them trainable, load it, and freeze them afterwards"
                )
            master = master_dtype(parameters[trained[0]])
            chunk = replace(chunk, trainable=True, master_dtype=master, rule=found[0])
        chunks.append(chunk)
    return replace(layout, chunks=tuple(chunks))


def divide(layout: Layout, shards: Callable[[ChunkLayout], int], unit: int = 1) -> Layout:
    """The layout with each chunk divided into `shards(chunk)` shards, padded so that all shards have the same length
    and start where slots may."""
    chunks = []
    for chunk in layout.chunks:
        count = shards(chunk)
        apart = count * alignment(chunk.dtype, unit)
        numel = -(-chunk.numel // apart) * apart if count > 1 else chunk.numel
        chunks.append(replace(chunk, numel=numel, shards=count))
    return replace(layout, chunks=tuple(chunks))


def _chunk_bytes(used: Mapping[str, Use], blocks: tuple[str, ...], dtypes: Mapping[str, torch.dtype], unit: int) -> int:
    sizes: dict[str, int] = defaultdict(int)
    for name, use in used.items():
        apart = alignment(dtypes[name], unit)
        numel = -(-prod(use.shape) // apart) * apart
        sizes[_block_of(name, blocks)] += numel * dtypes[name].itemsize
    largest = max((size for block, size in sizes.items() if block), default=max(sizes.values(), default=0))
    pieces = -(-largest // LARGEST_CHUNK_BYTES)
    return max(largest // max(pieces, 1), SMALLEST_CHUNK_BYTES)


def _block_of(name: str, blocks: tuple[str, ...]) -> str:
    return next((block for block in blocks if name.startswith(block + ".")), "")
