"""The mesh of processes, and how a tensor lies on it: plain dataclasses shared by plans, passes and the machine.

A mesh names its axes; a process has one coordinate on each, and the last axis varies fastest with the rank. On every
axis a tensor is replicated, sharded along one of its dimensions, or partial: a term of a sum that is still to be taken.
An axis's kind, set by the code that makes the mesh, says what processes along it have in common; names are for people.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

AxisKind = Literal["data", "tensor", "replica", "pipeline", "expert"]
"""Which of a step's examples, and which weights, the processes along an axis have:

    kind        examples                             weights
    data        a batch each                         the same
    replica     different rows of one batch          the same
    tensor      one batch, divided as the mode says  a shard each
    expert      a batch each                         the same, except for different experts
    pipeline    the same batch                       those of different layers
"""

OWN_BATCH: frozenset[AxisKind] = frozenset({"data", "expert"})
SAME_WEIGHTS: frozenset[AxisKind] = frozenset({"data", "replica", "expert"})
ONE_BATCH_IN_PARTS: frozenset[AxisKind] = frozenset({"tensor", "replica"})


@dataclass(frozen=True)
class Shard:
    """One of equal parts along dimension `dim`.

    If the tensor is a fused projection, such as query, key and value in one, its `sections` lie one behind the other,
    and every process has its part of each section.
    """

    dim: int
    sections: int = 1

    def __str__(self) -> str:
        return f"S{self.dim}" + (f"/{self.sections}" if self.sections > 1 else "")


@dataclass(frozen=True)
class Replicate:
    """The whole tensor."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Partial:
    """A term: the tensor is the sum over the axis."""

    def __str__(self) -> str:
        return "P"


Placement = Shard | Replicate | Partial
REPLICATE, PARTIAL = Replicate(), Partial()
Placements = tuple[Placement, ...]
"""One placement for each of a mesh's tensor axes, in their order."""


@dataclass(frozen=True)
class Axis:
    """`size` processes along one dimension of the mesh. Raises ValueError for an unknown kind."""

    name: str
    size: int
    kind: AxisKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(AxisKind):
            expected = ", ".join(get_args(AxisKind))
            raise ValueError(f"the axis {self.name!r} has the kind {self.kind!r}; expected one of {expected}")


@dataclass(frozen=True)
class Mesh:
    """All processes, by coordinates. Axes of size 1 are left out; without axes there is one process."""

    axes: tuple[Axis, ...] = ()

    @cached_property
    def size(self) -> int:
        return prod(axis.size for axis in self.axes)

    @cached_property
    def tensor_axes(self) -> tuple[Axis, ...]:
        """The axes that a program's tensors are placed on: processes along them share one batch."""
        return self._of(ONE_BATCH_IN_PARTS)

    @cached_property
    def weight_axes(self) -> tuple[Axis, ...]:
        """The tensor axes that weights are sharded over."""
        return self._of(frozenset({"tensor"}))

    @cached_property
    def replica_axes(self) -> tuple[Axis, ...]:
        """The axes along which all weights but experts' are the same. Programs leave gradients partial along them; the
        machine sums gradients and ZeRO divides training states over them, chunk by chunk."""
        return self._of(SAME_WEIGHTS)

    @cached_property
    def batch_axes(self) -> tuple[Axis, ...]:
        """The axes along which every process has its own batch."""
        return self._of(OWN_BATCH)

    @cached_property
    def pipeline_axes(self) -> tuple[Axis, ...]:
        """The axis along which processes run different layers on one batch; empty without a pipeline."""
        return self._of(frozenset({"pipeline"}))

    @property
    def shares_batches(self) -> bool:
        """Whether several processes run one batch, each with a part of the tensors or of the layers."""
        return self.data_size < self.size

    @cached_property
    def data_size(self) -> int:
        """How many batches make up a step."""
        return prod(axis.size for axis in self.batch_axes)

    def data_rank(self, rank: int) -> int:
        """The index of a process's batch among the step's batches."""
        return self.number(rank, names_of(self.batch_axes))

    def pipeline_rank(self, rank: int) -> int:
        """A process's coordinate along the pipeline; 0 without a pipeline."""
        return self.number(rank, names_of(self.pipeline_axes))

    def reduction_axes(self, placement: str) -> tuple[str, ...]:
        """The names of the axes that a parameter's gradient is summed over, given its `placements_text`: the axes along
        which processes have the same weights, without those that this parameter is sharded over."""
        return tuple(name for name in names_of(self.replica_axes) if name not in sharded_over(placement))

    def ranks_over(self, names: tuple[str, ...]) -> int:
        """How many processes differ only in their coordinates on these axes."""
        return prod(axis.size for axis in self.axes if axis.name in names)

    def number(self, rank: int, names: tuple[str, ...]) -> int:
        """A process's index among the processes of `ranks_over`, in rank order."""
        found = 0
        for axis in self.axes:
            if axis.name in names:
                found = found * axis.size + self.coordinate(rank, axis.name)
        return found

    def coordinate(self, rank: int, name: str) -> int:
        """A process's coordinate on an axis; 0 on an axis that the mesh does not have."""
        for axis in reversed(self.axes):
            rank, coordinate = divmod(rank, axis.size)
            if axis.name == name:
                return coordinate
        return 0

    def _of(self, kinds: frozenset[AxisKind]) -> tuple[Axis, ...]:
        return tuple(axis for axis in self.axes if axis.kind in kinds)

    def __str__(self) -> str:
        return " x ".join(f"{axis.name} {axis.size}" for axis in self.axes) or "one process"


ONE_PROCESS = Mesh()


def names_of(axes: Iterable[Axis]) -> tuple[str, ...]:
    return tuple(axis.name for axis in axes)


def taken_together(names: tuple[str, ...]) -> str:
    """The name of several axes taken as one: "data x depth"."""
    return " x ".join(names)


def of_gradient(parameter: Placements, axes: tuple[Axis, ...]) -> Placements:
    """A gradient's placement at the end of a program: its parameter's, but partial along axes with the same weights."""
    return tuple(
        PARTIAL if axis.kind in SAME_WEIGHTS else placement for placement, axis in zip(parameter, axes, strict=True)
    )


def local_shape(shape: tuple[int, ...], placements: Placements, axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """The shape of one process's shard."""
    found = list(shape)
    for placement, axis in zip(placements, axes, strict=True):
        if isinstance(placement, Shard):
            found[placement.dim] //= axis.size
    return tuple(found)


def whole_shape(shard: tuple[int, ...], placements: Placements, axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """The inverse of `local_shape`."""
    found = list(shard)
    for placement, axis in zip(placements, axes, strict=True):
        if isinstance(placement, Shard):
            found[placement.dim] *= axis.size
    return tuple(found)


def take_shard(whole: Tensor, placement: Placement, coordinate: int, size: int) -> Tensor:
    """One process's shard of a tensor along one axis; a view, unless there are several sections."""
    if not isinstance(placement, Shard):
        return whole
    sections = [section.chunk(size, placement.dim)[coordinate] for section in _sections(whole, placement)]
    return sections[0] if len(sections) == 1 else torch.cat(sections, placement.dim)


def join_shards(shards: list[Tensor], placement: Placement) -> Tensor:
    """Joins all processes' shards along one axis: the inverse of `take_shard`."""
    if not isinstance(placement, Shard):
        return shards[0]
    by_section = zip(*(_sections(shard, placement) for shard in shards), strict=True)
    return torch.cat([piece for section in by_section for piece in section], placement.dim)


def local_shard(whole: Tensor, placements: Placements, mesh: Mesh, rank: int) -> Tensor:
    """One process's shard of a tensor that is placed on the mesh by `placements`."""
    for placement, axis in zip(placements, mesh.tensor_axes, strict=True):
        whole = take_shard(whole, placement, mesh.coordinate(rank, axis.name), axis.size)
    return whole


def _sections(tensor: Tensor, placement: Shard) -> tuple[Tensor, ...]:
    return tensor.chunk(placement.sections, placement.dim) if placement.sections > 1 else (tensor,)


def parse_placement(text: str) -> Placement:
    """The inverse of str(placement). Raises ValueError on anything else."""
    if text in ("R", "P"):
        return REPLICATE if text == "R" else PARTIAL
    dim, _, sections = text.removeprefix("S").partition("/")
    if not text.startswith("S") or not dim.isdigit() or not (sections or "1").isdigit():
        raise ValueError(f"{text!r} is not a placement; expected R, P, or S and a dimension, such as S0")
    return Shard(int(dim), int(sections or 1))


def placements_text(placements: Placements, axes: tuple[Axis, ...]) -> str:
    """Text such as "row=S0 col=S1", or "R" for a tensor that is replicated on all axes; axes on which it is are left
    out."""
    named = zip(placements, axes, strict=True)
    return " ".join(f"{axis.name}={placement}" for placement, axis in named if placement != REPLICATE) or "R"


def sharded_over(text: str) -> frozenset[str]:
    """The names of the axes in a `placements_text`."""
    return frozenset(item.partition("=")[0] for item in text.split() if item != "R")


def parse_placements(text: str, axes: tuple[Axis, ...]) -> Placements:
    """The inverse of `placements_text`. Raises ValueError for an unknown axis."""
    given: Mapping[str, str] = dict(item.split("=") for item in text.split()) if text != "R" else {}
    unknown = next((name for name in given if name not in {axis.name for axis in axes}), None)
    if unknown is not None:
        raise ValueError(f"{text!r} names the axis {unknown!r}; the axes are {', '.join(a.name for a in axes)}")
    return tuple(parse_placement(given.get(axis.name, "R")) for axis in axes)
