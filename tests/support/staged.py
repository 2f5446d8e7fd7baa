"""A model whose layers are divided over a pipeline by hand, with training states and without programs."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import geminifx
import torch
from geminifx.compiler.parallel import Parallel
from geminifx.compiler.planner.packing import divide
from geminifx.compiler.setup import Phase, Setup
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.request import Request
from geminifx.runtime.distributed.zero import Zero
from geminifx.runtime.isa.formats import TorchFormat
from geminifx.runtime.isa.homes import Home
from geminifx.runtime.isa.layout import ALIGNMENT_BYTES, ChunkLayout, Layout, Owners, Slot
from geminifx.runtime.isa.mesh import Axis, Mesh, Shard, local_shape, placements_text
from geminifx.runtime.isa.precision import master_dtype
from geminifx.runtime.machine import Machine
from geminifx.runtime.memory.chunks import ChunkStore
from geminifx.runtime.memory.torch_store import TorchStore
from geminifx.runtime.optimizer.own_store import OwnStore
from torch import Tensor, nn


class Tied(nn.Module):
    """Three layers, the last of which shares its weight with the first; another one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight


def tied(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


HOST = Home()
STAGES: dict[int, dict[str, Owners]] = {
    1: {"embed": (0,), "first": (0,), "norm": (0,), "frozen": (0,), "second": (0,)},
    2: {"embed": (0, 1), "first": (0,), "norm": (1,), "frozen": (1,), "second": (1,)},
    4: {"embed": (0, 3), "first": (1,), "norm": (1,), "frozen": (2,), "second": (3,)},
}
"""By the length of a pipeline: who has which module's parameters. Of four, one has nothing that is trained."""


@dataclass(frozen=True)
class World:
    """So many stages, each with so many processes that share its weights, and so many that have a part of these."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    zero: int = 0

    @property
    def mesh(self) -> Mesh:
        axes = (
            Axis("pipeline", self.pipeline, "pipeline"),
            Axis("data", self.data, "data"),
            Axis("tp", self.tensor, "tensor"),
        )
        return Mesh(tuple(axis for axis in axes if axis.size > 1))

    def layout(self, parameters: dict[str, nn.Parameter], dtypes: dict[str, torch.dtype], place: int) -> Layout:
        """Chunks of the parameters that the pipeline's process `place` has: matrices are sharded by their rows."""
        mesh, owners = self.mesh, STAGES[self.pipeline]
        slots: dict[Any, list[Slot]] = defaultdict(list)
        for name, parameter in parameters.items():
            who = owners[name.split(".")[0]]
            if place not in who:
                continue
            placed = tuple(Shard(0) for _ in mesh.tensor_axes) if parameter.ndim > 1 else ()
            shape = local_shape(tuple(parameter.shape), placed, mesh.tensor_axes[: len(placed)])
            placement = placements_text(placed, mesh.tensor_axes) if placed else "R" if mesh.tensor_axes else ""
            key = dtypes[name], master_dtype(parameter), parameter.requires_grad, who, placement
            unit = ALIGNMENT_BYTES // dtypes[name].itemsize
            offset = sum(-(-slot.numel // unit) * unit for slot in slots[key])
            slots[key].append(Slot(name, offset, shape, placement))
        chunks = []
        for (dtype, master, trained, _, placement), placed_in in slots.items():
            unit, last = ALIGNMENT_BYTES // dtype.itemsize, placed_in[-1]
            numel = -(-(last.offset + last.numel) // unit) * unit
            axes = mesh.reduction_axes(placement)
            chunks.append(ChunkLayout(len(chunks), numel, dtype, master, trained, tuple(placed_in), reduced_over=axes))
        owned = tuple((name, owners[name.split(".")[0]]) for name in parameters) if self.pipeline > 1 else ()
        plan = Plan(Request(zero=self.zero), mesh=mesh)
        return divide(Layout(tuple(chunks), (("head.weight", "embed.weight"),), owned), plan.shards)


def compiled(source: nn.Module, world: World, **options: Any) -> geminifx.CompiledModule:
    with mock.patch.object(Parallel, "mesh", lambda *_: world.mesh):
        return geminifx.compile(source, **options)


def placed(model: geminifx.CompiledModule, world: World, home: Home = HOST) -> geminifx.CompiledModule:
    """Give the model its training states, of the optimizer that was declared, or for torch's."""
    session = model.session
    parameters, declared = session._parameters, session._declared
    layout = world.layout(parameters, session.dtypes, session.ranks.mesh.pipeline_rank(session.ranks.rank))
    chunks = ChunkStore(layout, parameters, session.local_shards)
    plan = Plan(Request(zero=world.zero), layout, world.mesh)
    homes = tuple(home if chunk.trainable else replace(home, spare=False) for chunk in layout.chunks)
    if declared is None:
        plan = replace(plan, format=TorchFormat(8), homes=homes)
        own, store = None, TorchStore(chunks, session.hardware, plan.format, session.usage.stats, session.ranks)
    else:
        plan = replace(plan, format=declared.format, homes=homes)
        own = store = OwnStore(
            chunks, session.hardware, declared.format, session.usage.stats, Zero(session.ranks, world.zero)
        )
    session.setup, session.phase = Setup(plan, Machine(store, session.ranks), own), Phase.PLANNED
    if declared is not None:
        declared.attach(own)
    session.place()
    return model


def gradients(step: int) -> dict[str, Tensor]:
    """Any gradients, whole, of all that is trained."""
    generator, whole = torch.Generator().manual_seed(step), tied().named_parameters()
    return {name: torch.randn(p.shape, generator=generator) for name, p in whole if p.requires_grad}


def backward(model: geminifx.CompiledModule, whole: dict[str, Tensor]) -> None:
    """What a program does with gradients: those of the parameters that this process has, as it has them."""
    store, machine = model.session.store(), model.session.machine
    scale = store.begin_backward()
    for chunk in store.chunks.chunks:
        slots = [i for i, slot in enumerate(chunk.layout.slots) if slot.name in whole]
        if not slots:
            continue
        flat = machine.gradients(chunk.layout.numel, chunk.layout.dtype)
        flat.zero_()
        for i in slots:
            part = store.chunks.local_shards.take(whole[chunk.layout.slots[i].name], chunk.layout.slots[i])
            machine.put(flat, chunk.layout.slots[i].offset, part * scale)
        machine.reduce(flat, chunk.layout.index, slots)
        machine.accumulate_grad(flat, chunk.layout.index, slots)
    store.end_backward()
