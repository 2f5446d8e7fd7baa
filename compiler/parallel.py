"""The `parallel=` option: degrees of parallelism by name, and the mesh of processes that they make."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from ..passes.sharding.modes import MODES
from ..runtime.isa.errors import ArgumentError, did_you_mean, wrong_argument
from ..runtime.isa.mesh import Axis, Mesh
from ..runtime.isa.schedule import ROUND_ROBIN, Schedule

GRAMMAR = (
    "data=N, zero=0, 1, 2 or 3, tensor=MODE:SIZE (or tensor=2.5d:SIZE:DEPTH), sequence and pipeline=RANKS (or "
    "pipeline=RANKS:STAGES), separated by commas, such as data=2,tensor=2.5d:8:2"
)
NAMES = ("data", "tensor", "zero", "sequence", "pipeline")
EXPECTED = 'such as {"data": 2, "tensor": {"mode": "2.5d", "size": 8, "depth": 2}}'


@dataclass(frozen=True)
class Parallel:
    """Degrees of parallelism. The number of processes is data x size x pipeline.

    Fields:
        data: number of data-parallel groups, each with a batch of its own; None: as many as the world has room for.
        zero: what is sharded over the processes that hold the same weights (along `data`, 2.5d's depth and 3d's a): 1
            and 2 optimizer state and gradients, 3 weights too.
        mode: how tensors are sharded: "1d", "2d", "2.5d" or "3d"; None: not at all.
        size: number of processes that tensors are sharded over.
        depth: for 2.5d: number of layers of the square.
        sequence: for 1d: whether activations between blocks are sharded along the sequence.
        table: placements of parameters that override the mode's, by regular expressions of their names, such as
            {"lm_head.weight": "tp=S0"}.
        pipeline: number of pipeline ranks, each a process or group of processes with layers of its own.
        stages: number of stages that the layers are divided into, a multiple of `pipeline`; None: one per pipeline
            rank.
    """

    data: int | None = None
    zero: int = 0
    mode: str | None = None
    size: int = 1
    depth: int = 1
    sequence: bool = False
    table: tuple[tuple[str, str], ...] = ()
    pipeline: int = 1
    stages: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> "Parallel":
        """The degrees that `parallel=` declares. Raises ArgumentError for names and degrees that make no sense."""
        values = dict(given or {})
        _known(values, ("data", "zero", "tensor", "pipeline"), "parallel")
        pipeline = _pipeline(values.pop("pipeline", 1))
        _known(pipeline, ("ranks", "stages"), "parallel['pipeline']")
        tensor = _tensor(values.pop("tensor", None))
        _known(tensor, ("mode", "size", "depth", "sequence", "table"), "parallel['tensor']")
        degrees = {"pipeline": pipeline.get("ranks", 1), "stages": pipeline.get("stages")}
        found = cls(**values, **tensor | {"table": _table(tensor.get("table", {}))}, **degrees)
        found._check(given)
        return found

    def _check(self, given: Any) -> None:
        for name, degree in (
            ("data", 1 if self.data is None else self.data),
            ("size", self.size),
            ("depth", self.depth),
            ("pipeline", self.pipeline),
            ("stages", 1 if self.stages is None else self.stages),
        ):
            if type(degree) is not int or degree < 1:
                raise ArgumentError(f"parallel={given}: {name} is {degree!r}; expected a whole number of processes")
        if type(self.zero) is not int or self.zero not in (0, 1, 2, 3):
            raise ArgumentError(f"parallel={given}: zero is {self.zero!r}; expected 0, 1, 2 or 3")
        if self.mode is None and self.size > 1:
            raise ArgumentError(f"parallel={given}: tensor has no mode; expected one of {', '.join(MODES)}, {EXPECTED}")
        if type(self.sequence) is not bool:
            raise ArgumentError(f"parallel={given}: sequence is {self.sequence!r}; expected True or False")
        if self.mode is not None and (not isinstance(self.mode, str) or self.mode not in MODES):
            hint = did_you_mean(self.mode, MODES, f"expected {' or '.join(MODES)}")
            raise ArgumentError(f"parallel={given}: the mode {self.mode!r} is unknown; {hint}")
        if self.depth > 1 and self.mode != "2.5d":
            raise ArgumentError(f"parallel={given}: only the mode '2.5d' has a depth")
        if self.sequence and self.mode != "1d":
            raise ArgumentError(f"parallel={given}: only the mode '1d' shards along the sequence")
        if self.stages is not None and self.stages % self.pipeline:
            raise ArgumentError(
                f"parallel={given}: {self.stages} stages cannot be divided equally over {self.pipeline} ranks; "
                f"expected a multiple of {self.pipeline}"
            )
        self.tensor_axes()

    @property
    def is_staged(self) -> bool:
        """Whether the layers are divided into stages, even if one process runs them all."""
        return self.pipeline > 1 or (self.stages or 1) > 1

    @property
    def stages_per_rank(self) -> int:
        return (self.stages or self.pipeline) // self.pipeline

    def tensor_axes(self) -> tuple[Axis, ...]:
        """The mesh axes of the mode. Raises ArgumentError if `size` processes do not form its mesh."""
        if self.mode is None or self.size == 1:
            return ()
        roles = MODES[self.mode]
        # Along an axis that shards only the batch, all processes hold the same weights.
        axes = (Axis(name, size, "tensor" if roles[name].weight else "replica") for name, size in self._sizes().items())
        return tuple(axis for axis in axes if axis.size > 1)

    def _sizes(self) -> dict[str, int]:
        """The size of each of the mode's axes, by name."""
        if self.mode == "1d":
            return {"tp": self.size}
        if self.mode == "3d":
            side = round(self.size ** (1 / 3))
            if side**3 != self.size:
                raise ArgumentError(
                    f"parallel: 3d shards over a cube of processes (8, 27, 64, ...); size={self.size} is not a cube"
                )
            return dict.fromkeys(("a", "b", "c"), side)
        side = isqrt(self.size // self.depth)
        if side * side * self.depth != self.size:
            layers = f"{self.depth} square(s)" if self.mode == "2.5d" else "a square"
            raise ArgumentError(
                f"parallel: {self.mode} shards over {layers} of processes; size={self.size} is not {layers}"
            )
        return ({"depth": self.depth} if self.mode == "2.5d" else {}) | {"row": side, "col": side}

    def mesh(self, world_size: int | None, launched: int) -> Mesh:
        """The mesh for `world_size` processes; None: for the processes launched, or, alone, as many as the degrees
        make.

        Raises ArgumentError if the degrees do not multiply to the world.
        """
        one_batch = self.size * self.pipeline
        world = world_size or (launched if launched > 1 else (self.data or 1) * one_batch)
        data = self.data or max(world // one_batch, 1)
        if data * one_batch != world:
            degrees = f"data={data} times tensor={self.size}"
            degrees += f" times pipeline={self.pipeline}" if self.pipeline > 1 else ""
            raise ArgumentError(
                f"{degrees} is {data * one_batch} processes, but the world has {world}; the product of the degrees "
                "must be the size of the world: change parallel=, world_size=, or the number of processes that "
                "torchrun launches"
            )
        outer = (Axis("pipeline", self.pipeline, "pipeline"), Axis("data", data, "data"))
        return Mesh((*(axis for axis in outer if axis.size > 1), *self.tensor_axes()))


def cannot_run(degrees: Parallel, microbatches: int = 1, schedule: str | Schedule | None = None) -> str:
    """Why a training step cannot run with these degrees, and what to change; "" if it can."""
    is_round_robin = schedule.weights == "host" if isinstance(schedule, Schedule) else schedule == ROUND_ROBIN
    if is_round_robin and degrees.mode is not None:
        return (
            "a round-robin schedule, whose stages do not belong to ranks, does not support sharded tensors; leave "
            "tensor= out of parallel=, or use a schedule whose stages belong to ranks, such as schedule='1f1b'"
        )
    if microbatches > 1 and degrees.mode is not None and not degrees.is_staged:
        return (
            f"microbatches={microbatches} does not support sharded tensors, whose processes divide the batch as "
            "parallel= says; leave it out, or accumulate gradients in the training loop"
        )
    return ""


def _tensor(given: Any) -> dict[str, Any]:
    """The fields of `tensor`, which is a dict, or "mode:size" or "mode:size:depth" for short. Raises ArgumentError for
    anything else."""
    if isinstance(given, str):
        mode, *numbers = given.split(":")
        if len(numbers) not in (1, 2):
            raise ArgumentError(
                f"parallel: tensor={given!r} has {len(numbers)} numbers; expected a size, and for 2.5d a depth"
            )
        given = {"mode": mode} | {name: _number(text) for name, text in zip(("size", "depth"), numbers, strict=False)}
    if given is not None and not isinstance(given, Mapping):
        raise ArgumentError(
            f"parallel: tensor={given!r}; expected a mode and a size, \"1d:4\" or {{'mode': '1d', 'size': 4}}"
        )
    return dict(given or {})


def _pipeline(given: Any) -> dict[str, Any]:
    """The fields of `pipeline`, which is a number of ranks, a dict of ranks and stages, or "ranks:stages". Raises
    ArgumentError for text that is neither."""
    if isinstance(given, str):
        ranks, colon, stages = given.partition(":")
        given = {"ranks": _number(ranks)} | ({"stages": _number(stages)} if colon else {})
    if not isinstance(given, Mapping):
        given = {"ranks": given}
    return dict(given)


def _table(given: Any) -> tuple[tuple[str, str], ...]:
    """The items of `table`, which maps regular expressions of names to placements. Raises ArgumentError otherwise."""
    expected = 'placements by regular expressions of names, such as {"lm_head.weight": "tp=S0"}'
    if not isinstance(given, Mapping):
        raise wrong_argument("parallel['tensor']['table']", given, expected)
    for pattern, placement in given.items():
        if not isinstance(pattern, str) or not isinstance(placement, str):
            raise wrong_argument("parallel['tensor']['table']", given, expected)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ArgumentError(
                f"parallel['tensor']['table'] has {pattern!r}, which is not a regular expression: {error}"
            ) from None
    return tuple(given.items())


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def parse_parallel(text: str) -> dict[str, Any]:
    """The `parallel=` that the command line's --parallel stands for. Raises ArgumentError, which shows the grammar."""
    found: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, _, value = item.partition("=")
        if name in found or (name == "sequence") != (value == "") or name not in NAMES:
            raise ArgumentError(f"--parallel {text!r}: {item!r} cannot be parsed; expected {GRAMMAR}")
        found[name] = value if name in ("tensor", "pipeline") else _number(value)
    if found.pop("sequence", None) is not None:
        found["tensor"] = {**_tensor(found.get("tensor")), "sequence": True}
    try:
        Parallel.of(found)
    except ArgumentError as error:
        raise ArgumentError(f"--parallel {text!r}: {error}. The full syntax is {GRAMMAR}") from error
    return found


def _known(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    unknown = next((name for name in values if name not in names), None)
    if unknown is not None:
        hint = did_you_mean(unknown, names, f"expected {', '.join(names)}, {EXPECTED}")
        raise ArgumentError(f"{where} has {unknown!r}; {hint}")
