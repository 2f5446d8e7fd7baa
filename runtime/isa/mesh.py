"""The mesh of processes, and how a tensor lies on it: plain dataclasses shared by plans, passes and the machine.

A mesh names its axes; a process has one coordinate on each, the last axis running fastest. On every axis a tensor
is replicated, sharded along one of its dimensions, or partial: a term of a sum that is still to be taken. What the
processes along an axis have in common is its kind, which whoever makes a mesh sets; names are for people alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

AxisKind = Literal["data", "tensor", "replica", "pipeline", "expert"]
"""What processes along an axis have of a step's examples, and of the weights:

    kind        examples                             weights
    data        each a batch of its own              the same
    replica     each other rows of one batch         the same
    tensor      as the mode says, of one batch       each a part
    expert      each a batch of its own              the same, but each other experts
    pipeline    the same batch                       each those of other layers
"""

OWN_BATCH: frozenset[AxisKind] = frozenset({"data", "expert"})
SAME_WEIGHTS: frozenset[AxisKind] = frozenset({"data", "replica", "expert"})
ONE_BATCH_IN_PARTS: frozenset[AxisKind] = frozenset({"tensor", "replica"})


@dataclass(frozen=True)
class Shard:
    """One of equal parts along dimension `dim`.

    Of a fused projection, such as one that makes query, key and value in one, every process has its shard of each
    of the `sections`, which lie one behind the other.
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
    """A term; the tensor is the sum over the axis."""

    def __str__(self) -> str:
        return "P"


Placement = Shard | Replicate | Partial
REPLICATE, PARTIAL = Replicate(), Partial()
Placements = tuple[Placement, ...]
"""One placement for each of a mesh's tensor axes, in their order."""


@dataclass(frozen=True)
class Axis:
    """`size` processes in a row. Raises ValueError for a kind that there is not."""

    name: str
    size: int
    kind: AxisKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(AxisKind):
            expected = ", ".join(get_args(AxisKind))
            raise ValueError(f"the axis {self.name!r} has the kind {self.kind!r}; expected one of {expected}")


@dataclass(frozen=True)
class Mesh:
    """All processes, by coordinates. Axes of size 1 are left out; no axes: one process."""

    axes: tuple[Axis, ...] = ()

    @cached_property
    def size(self) -> int:
        return prod(axis.size for axis in self.axes)

    @cached_property
    def tensor_axes(self) -> tuple[Axis, ...]:
        """The axes that the tensors of a program are placed on: its processes share one batch."""
        return self._of(ONE_BATCH_IN_PARTS)

    @cached_property
    def weight_axes(self) -> tuple[Axis, ...]:
        """Those of them that weights are sharded over."""
        return self._of(frozenset({"tensor"}))

    @cached_property
    def replica_axes(self) -> tuple[Axis, ...]:
        """The axes along which weights are the same, unless they are an expert's. A program leaves gradients partial
        along them; they are summed, and ZeRO divides training states, by chunk."""
        return self._of(SAME_WEIGHTS)

    @cached_property
    def batch_axes(self) -> tuple[Axis, ...]:
        """The axes along which every process has a batch of its own."""
        return self._of(OWN_BATCH)

    @cached_property
    def pipeline_axes(self) -> tuple[Axis, ...]:
        """The axis along which processes run other layers of one batch; none without pipeline."""
        return self._of(frozenset({"pipeline"}))

    @property
    def shares_batches(self) -> bool:
        """Whether several processes run one batch, each a part of its tensors or of the layers."""
        return self.data_size < self.size

    @cached_property
    def data_size(self) -> int:
        """How many batches make one step's."""
        return prod(axis.size for axis in self.batch_axes)

    def data_rank(self, rank: int) -> int:
        """Which of the step's batches is a process's."""
        return self.number(rank, names_of(self.batch_axes))

    def pipeline_rank(self, rank: int) -> int:
        """Which of the pipeline's processes one is, counted from those that begin it; 0 without pipeline."""
        return self.number(rank, names_of(self.pipeline_axes))

    def reduction_axes(self, placement: str) -> tuple[str, ...]:
        """The names of the axes over which the gradient of a parameter is summed that lies by `placement`, a
        `placements_text`: those along which processes have the same weights, and this one whole."""
        return tuple(name for name in names_of(self.replica_axes) if name not in sharded_over(placement))

    def ranks_over(self, names: tuple[str, ...]) -> int:
        """How many processes differ in their places on these axes alone."""
        return prod(axis.size for axis in self.axes if axis.name in names)

    def number(self, rank: int, names: tuple[str, ...]) -> int:
        """Which of them a process is, counted in the order of their ranks."""
        found = 0
        for axis in self.axes:
            if axis.name in names:
                found = found * axis.size + self.coordinate(rank, axis.name)
        return found

    def coordinate(self, rank: int, name: str) -> int:
        """Where a process stands on an axis; 0 on one that the mesh does not have."""
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
    """What several axes are called where they are one: "data x depth"."""
    return " x ".join(names)


def of_gradient(parameter: Placements, axes: tuple[Axis, ...]) -> Placements:
    """How a gradient leaves a program: as its parameter lies, and a term of a sum over the replicas."""
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
    """One process's shard of a tensor on one axis. A view, unless there are several sections."""
    if not isinstance(placement, Shard):
        return whole
    sections = [section.chunk(size, placement.dim)[coordinate] for section in _sections(whole, placement)]
    return sections[0] if len(sections) == 1 else torch.cat(sections, placement.dim)


def join_shards(shards: list[Tensor], placement: Placement) -> Tensor:
    """The tensor of all processes' shards on one axis: the inverse of `take_shard`."""
    if not isinstance(placement, Shard):
        return shards[0]
    by_section = zip(*(_sections(shard, placement) for shard in shards), strict=True)
    return torch.cat([piece for section in by_section for piece in section], placement.dim)


def local_shard(whole: Tensor, placements: Placements, mesh: Mesh, rank: int) -> Tensor:
    """One process's shard of a tensor that lies on the mesh by `placements`."""
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
        raise ValueError(f"{text!r} is no placement; expected R, P, or S and a dimension, such as S0")
    return Shard(int(dim), int(sections or 1))


def placements_text(placements: Placements, axes: tuple[Axis, ...]) -> str:
    """Such as "row=S0 col=S1"; axes on which the tensor is replicated are left out."""
    named = zip(placements, axes, strict=True)
    return " ".join(f"{axis.name}={placement}" for placement, axis in named if placement != REPLICATE) or "R"


def sharded_over(text: str) -> frozenset[str]:
    """The names of the axes in a `placements_text`."""
    return frozenset(item.partition("=")[0] for item in text.split() if item != "R")


def parse_placements(text: str, axes: tuple[Axis, ...]) -> Placements:
    """The inverse of `placements_text`. Raises ValueError for an axis that is not there."""
    given: Mapping[str, str] = dict(item.split("=") for item in text.split()) if text != "R" else {}
    unknown = next((name for name in given if name not in {axis.name for axis in axes}), None)
    if unknown is not None:
        raise ValueError(f"{text!r} names the axis {unknown!r}; the axes are {', '.join(a.name for a in axes)}")
    return tuple(parse_placement(given.get(axis.name, "R")) for axis in axes)
