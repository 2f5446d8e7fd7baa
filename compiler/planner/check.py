"""Checks that a plan written by hand, or made for another model, fits this one."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from ...passes.program.plan import Plan
from ...runtime.isa.errors import ArgumentError
from ...runtime.isa.formats import OwnFormat
from ...runtime.isa.layout import ALIGNMENT_BYTES, ChunkLayout
from ...runtime.isa.mesh import parse_placements, whole_shape
from ...runtime.isa.precision import master_dtype

NOT_CUT = (
    "the plan does not fit moments={!r}: parameters in its chunks do not begin at multiples of {} elements, which are "
    "updated together; save a plan made after model.optimizer(...) was called with these moments"
)
NOT_TOGETHER = (
    "the plan's chunks do not suit the optimizer: each chunk must hold parameters that are updated by the same rule, "
    "and chunks of parameters that are updated as a unit must be on the device or streamed through it; save a plan "
    "made after model.optimizer(...) was called with this optimizer"
)


@dataclass(frozen=True)
class Violation:
    """A field of a plan that does not fit: what it is, and what is expected."""

    field: str
    found: Any
    expected: str


def check_plan(plan: Plan, parameters: dict[str, nn.Parameter], blocks: tuple[str, ...],
               dtypes: Mapping[str, torch.dtype], pipeline_rank: int = 0) -> None:  # fmt: skip
    """Raises ArgumentError naming the field, what was found and what was expected.

    `parameters` are the model's by their first names, `dtypes` the dtypes they compute in. The plan must be for the
    process with rank `pipeline_rank` along the pipeline.
    """
    violation = next(_violations(plan, parameters, blocks, dtypes, pipeline_rank), None)
    if violation is not None:
        raise ArgumentError(
            f"the plan does not fit this model: {violation.field} is {violation.found}, expected "
            f"{violation.expected}; save a plan of this model with geminifx.compile(...).plan.save(path)"
        )


def check_cut(given: Plan, format: OwnFormat) -> None:
    """Raises ArgumentError for a plan whose chunks do not suit updates of this format."""
    if not given.layout.is_cut_for(format.unit):
        raise ArgumentError(NOT_CUT.format(format.stored, format.unit))
    there = all(home.where in format.wheres(chunk) for chunk, home in given.placed(given.homes) if chunk.is_whole)
    if not there or not given.layout.follows(dict(format.rules)):
        raise ArgumentError(NOT_TOGETHER)


def _violations(plan: Plan, parameters: dict[str, nn.Parameter], blocks: tuple[str, ...],
              dtypes: Mapping[str, torch.dtype], pipeline_rank: int) -> Iterator[Violation]:  # fmt: skip
    yield from _in_shape(plan)
    for chunk in plan.layout.chunks:
        yield from _in_place(chunk)
    yield from _owned(plan, parameters)
    yield from _for_parameters(plan, parameters, pipeline_rank)
    for chunk in plan.layout.chunks:
        yield from _of_dtype(chunk, parameters, dtypes)
    yield from _choices(plan, blocks)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _in_shape(plan: Plan) -> Iterator[Violation]:
    """Counts are counts, chunks are numbered from 0 (programs refer to them by index), and shards match the mesh."""
    for i, chunk in enumerate(plan.layout.chunks):
        where = f"layout.chunks[{i}]"
        if chunk.index != i:
            yield Violation(f"{where}.index", repr(chunk.index), f"{i}: chunks are numbered from 0 in order")
        if not _is_count(chunk.numel):
            yield Violation(f"{where}.numel", repr(chunk.numel), "a number of elements")
        for slot in chunk.slots:
            axes = plan.mesh.reduction_axes(slot.placement)
            if chunk.reduced_over != axes:
                expected = f"{axes}: along these axes of the mesh processes have {slot.name!r} alike"
                yield Violation(f"{where}.reduced_over", repr(chunk.reduced_over), expected)
        shards, alignment = plan.shards(chunk), ALIGNMENT_BYTES // chunk.dtype.itemsize
        if chunk.shards != shards:
            yield Violation(f"{where}.shards", repr(chunk.shards), f"{shards}, as parallel= says")
        elif shards > 1 and chunk.numel % (shards * alignment):
            expected = f"a multiple of {shards * alignment}: shards begin at multiples of {ALIGNMENT_BYTES} bytes"
            yield Violation(f"{where}.numel", repr(chunk.numel), expected)
        for slot in chunk.slots:
            if not _is_count(slot.offset):
                yield Violation(f"{where}: the offset of {slot.name!r}", repr(slot.offset), "a number of elements")
            if not all(map(_is_count, slot.shape)):
                yield Violation(f"{where}: the shape of {slot.name!r}", repr(slot.shape), "sizes of 0 or more")


def _in_place(chunk: ChunkLayout) -> Iterator[Violation]:
    """Slots are aligned, do not overlap, and end inside the chunk."""
    where, alignment = f"layout.chunks[{chunk.index}]", ALIGNMENT_BYTES // chunk.dtype.itemsize
    end, previous = 0, ""
    for slot in sorted(chunk.slots, key=lambda slot: (slot.offset, slot.numel)):
        field = f"{where}: the offset of {slot.name!r}"
        if slot.offset < end:
            yield Violation(field, slot.offset, f"{end} or more, after {previous!r}, which it overlaps")
        if slot.offset % alignment:
            yield Violation(field, slot.offset, f"a multiple of {alignment} ({ALIGNMENT_BYTES} bytes)")
        end, previous = slot.offset + slot.numel, slot.name
        if end > chunk.numel:
            yield Violation(f"{where}.numel", chunk.numel, f"{end} or more, where {slot.name!r} ends")


def _owned(plan: Plan, parameters: dict[str, nn.Parameter]) -> Iterator[Violation]:
    """In a pipeline every parameter has owners, listed in the model's order, and all parameters of a chunk have the
    same. Without a pipeline no parameter has any."""
    layout, ranks = plan.layout, prod(axis.size for axis in plan.mesh.pipeline_axes)
    names = [name for name, _ in layout.owned]
    expected = list(parameters) if ranks > 1 else []
    if names != expected:
        yield Violation("layout.owned: the names", names, f"{expected}, the model's parameters in their order")
    for name, owners in layout.owned:
        if not owners or list(owners) != sorted(set(owners)) or not set(owners) <= set(range(ranks)):
            hint = f"some of 0 to {ranks - 1}, places along the pipeline, in their order"
            yield Violation(f"layout.owned: the owners of {name!r}", owners, hint)
    for chunk in layout.chunks:
        found = {layout.owners.get(slot.name) for slot in chunk.slots}
        if len(found) > 1:
            where = f"layout.chunks[{chunk.index}]: the owners of its parameters"
            yield Violation(where, found, "the same ones for all")


def _for_parameters(plan: Plan, parameters: dict[str, nn.Parameter], pipeline_rank: int) -> Iterator[Violation]:
    """Each parameter that this process owns has exactly one slot, of its shape, and there are no other slots."""
    slots = [slot for chunk in plan.layout.chunks for slot in chunk.slots]
    counts = Counter(slot.name for slot in slots)
    for name in parameters:
        owners = plan.layout.owners.get(name, (pipeline_rank,))
        expected = int(pipeline_rank in owners)
        if counts[name] != expected:
            whose = "" if expected else f": it lies at {', '.join(map(str, owners))} along the pipeline"
            field = f"layout: the number of slots of parameter {name!r}"
            yield Violation(field, counts[name], f"{expected}{whose}")
    for slot in slots:
        if slot.name not in parameters:
            yield Violation("layout: the name of a slot", repr(slot.name), "a parameter of the model")
            continue
        try:
            whole = whole_shape(
                slot.shape, parse_placements(slot.placement, plan.mesh.tensor_axes), plan.mesh.tensor_axes
            )
        except (ValueError, IndexError):
            axes = ", ".join(axis.name for axis in plan.mesh.tensor_axes) or "none"
            hint = f"how it lies over the axes of this mesh, which are {axes}"
            yield Violation(f"layout: the placement of {slot.name!r}", repr(slot.placement), hint)
            continue
        shape = tuple(parameters[slot.name].shape)
        if whole != shape:
            of = f"{shape}, the parameter's" + (f", of which it is the part {slot.placement}" if slot.placement else "")
            yield Violation(f"layout: the shape of {slot.name!r}", slot.shape, of)


def _of_dtype(
    chunk: ChunkLayout, parameters: dict[str, nn.Parameter], dtypes: Mapping[str, torch.dtype]
) -> Iterator[Violation]:
    where = f"layout.chunks[{chunk.index}]"
    for name in (slot.name for slot in chunk.slots):
        master = master_dtype(parameters[name])
        if chunk.dtype != dtypes[name]:
            hint = f"{dtypes[name]}, in which {name!r} computes (precision= decides)"
            yield Violation(f"{where}.dtype", chunk.dtype, hint)
        if chunk.master_dtype != master:
            yield Violation(f"{where}.master_dtype", chunk.master_dtype, f"{master}, which the optimizer updates")
        if parameters[name].requires_grad != chunk.trainable:
            state = "trained" if parameters[name].requires_grad else "frozen"
            expected = f"{parameters[name].requires_grad}: {name!r} is {state}"
            yield Violation(f"{where}.trainable", chunk.trainable, expected)


def _choices(plan: Plan, blocks: tuple[str, ...]) -> Iterator[Violation]:
    count = len(plan.layout.chunks)
    if len(plan.homes) != count:
        yield Violation("homes", f"{len(plan.homes)} of them", f"{count}, one for each chunk")
    for index, home in enumerate(plan.homes[:count]):
        if home.streamed and not plan.layout.chunks[index].trainable:
            expected = "'host' or 'device': only trained chunks can be streamed"
            yield Violation(f"homes[{index}].where", repr(home.where.value), expected)
    if not _is_count(plan.microbatches) or plan.microbatches < 1:
        yield Violation("microbatches", repr(plan.microbatches), "1 or more")
    elif not _is_count(plan.rounds) or plan.rounds < 1 or plan.microbatches % plan.rounds:
        yield Violation("rounds", repr(plan.rounds), f"a divisor of the {plan.microbatches} microbatches")
    elif plan.rounds > 1 and plan.schedule is not None:
        yield Violation("rounds", repr(plan.rounds), "1: a pipeline has a schedule instead")
    if not _is_count(plan.prefetch):
        yield Violation("prefetch", repr(plan.prefetch), "0 or more chunks")
    for field, names in (("recompute", plan.recompute), ("offload", plan.offload), ("offload_sums", plan.offload_sums),
                         ("blocks", plan.blocks)):  # fmt: skip
        for name in names:
            if name not in blocks and not (name == "" and field == "offload_sums"):
                yield Violation(field, f"{name!r} among others", f"names of blocks: {', '.join(blocks) or 'none'}")
