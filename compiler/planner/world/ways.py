"""Enumerates the ways in which a world of processes can share the work."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, Literal

import numpy as np

from ....runtime.isa.schedule import ROUND_ROBIN
from ...parallel import Parallel, cannot_run
from ..pipeline.schedules import Shape, misfit

Home = Literal["device", "host"]

SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb1p", 1), ("zbv", 2))
"""The pipeline schedules to weigh, with their stages per rank. gpipe is left out: as slow as 1f1b, and holds more."""

MOST_MICROBATCHES, MOST_TENSOR, MOST_PIPELINE = 256, 64, 128
"""Larger ones never win."""


@dataclass(frozen=True)
class Way:
    """One way to share the work.

    Fields:
        data: the number of groups of processes with a batch of their own.
        pipeline: the ranks of the pipeline.
        mode, tensor, depth: how tensors are sharded, over how many processes, and the depth of "2.5d"; "" and 1: not.
        zero: the ZeRO stage.
        microbatches: the number that each group's batch is run as.
        schedule, stages_per_rank: of the pipeline; "" and 1 without one.
        home: where training states live.
        recompute: the share of the blocks that is recomputed in the backward.
    """

    data: int = 1
    pipeline: int = 1
    mode: str = ""
    tensor: int = 1
    depth: int = 1
    zero: int = 0
    microbatches: int = 1
    schedule: str = ""
    stages_per_rank: int = 1
    home: Home = "device"
    recompute: float = 0.0

    @property
    def replicas(self) -> int:
        """The number of processes with the same weights."""
        return self.data * self.depth

    @property
    def side(self) -> int:
        """The side of the square of processes of 2d, or of each of 2.5d's."""
        return isqrt(self.tensor // self.depth)

    @property
    def parts(self) -> int:
        """The number of processes that weights are sharded over."""
        return self.tensor // self.depth

    @property
    def stages(self) -> int:
        return self.stages_per_rank * (1 if self.schedule == ROUND_ROBIN else self.pipeline)

    @classmethod
    def of(cls, parallel: Parallel, data: int, microbatches: int = 1, schedule: str = "") -> "Way":
        """The way that `parallel=` declares, for `data` groups of processes with a batch of their own."""
        named = schedule or ("1f1b" if parallel.stages_per_rank == 1 else "interleaved")
        return cls(
            data, parallel.pipeline, parallel.mode or "", parallel.size, parallel.depth, parallel.zero, microbatches,
            named if parallel.pipeline > 1 else "", parallel.stages_per_rank,
        )  # fmt: skip

    def degrees(self) -> dict[str, Any]:
        """The value of `parallel=` that declares it."""
        found: dict[str, Any] = {"data": self.data}
        if self.zero:
            found["zero"] = self.zero
        if self.pipeline > 1:
            stages = self.stages - self.stages % self.pipeline
            found["pipeline"] = {"ranks": self.pipeline, "stages": stages}
        if self.tensor > 1:
            depth = {"depth": self.depth} if self.mode == "2.5d" else {}
            found["tensor"] = {"mode": self.mode, "size": self.tensor, **depth}
        return found

    def options(self) -> dict[str, Any]:
        """The options of compile that declare it. The process's own plan decides the rest: where states live, what is
        recomputed, and, without a pipeline, the number of microbatches."""
        found: dict[str, Any] = {"parallel": self.degrees()}
        return found | ({"schedule": self.schedule, "microbatches": self.microbatches} if self.pipeline > 1 else {})

    def __str__(self) -> str:
        words = [f"data {self.data}"] if self.data > 1 else []
        if self.pipeline > 1:
            stages = f" ({self.stages_per_rank} stages each)" if self.stages > self.pipeline else ""
            stages = f" ({self.stages} stages of any rank)" if self.schedule == ROUND_ROBIN else stages
            words.append(f"pipeline {self.pipeline}{stages} by {self.schedule}")
        if self.tensor > 1:
            words.append(f"tensor {self.mode} {self.tensor}" + (f" of depth {self.depth}" if self.depth > 1 else ""))
        words += [f"ZeRO {self.zero}"] if self.zero else []
        words += [f"{self.microbatches} microbatches"] if self.microbatches > 1 else []
        words += [f"{self.recompute:.0%} recomputed"] if self.recompute else []
        words += ["states on the host"] if self.home == "host" else []
        return ", ".join(words) or "one process"


@dataclass(frozen=True)
class Space:
    """The ways to choose from.

    Fields:
        world: the number of processes.
        examples: the examples of a step, over all processes.
        blocks, heads: the model's, which bound the stages and must be divisible by the shards of tensors; 0 allows
            none.
        microbatches: the number that was asked for; None: any.
        homes: where training states may live.
        refusal: why a way must not be taken; "" where it may. By default it refuses what the product cannot run.
    """

    world: int
    examples: int
    blocks: int
    heads: int
    microbatches: int | None = None
    homes: tuple[Home, ...] = ("device", "host")
    refusal: Callable[[Way], str] = lambda way: cannot_run(Parallel.of(way.degrees()), way.microbatches, way.schedule)

    def ways(self) -> Iterator[Way]:
        """All ways that fit the model and the batch, the simplest first, whether or not they fit the memory."""
        for mode, tensor, depth in self._tensors():
            for pipeline in _divisors(self.world // tensor, min(MOST_PIPELINE, max(self.blocks, 1))):
                data = self.world // tensor // pipeline
                if self.examples % data:
                    continue
                for schedule, stages_per_rank in self._schedules(pipeline):
                    for microbatches in self._microbatches(data, mode, tensor, depth):
                        way = Way(data, pipeline, mode, tensor, depth, 0, microbatches, schedule, stages_per_rank)
                        if self._fits(way):
                            yield from self._of_states(way)

    def _tensors(self) -> Iterator[tuple[str, int, int]]:
        yield "", 1, 1
        for size in _divisors(self.world, MOST_TENSOR)[1:]:
            if self.heads and self.heads % size == 0:
                yield "1d", size, 1
            for depth in _divisors(size, size // 4):
                side = isqrt(size // depth)
                if side > 1 and side * side * depth == size and self.heads and self.heads % side == 0:
                    yield ("2d" if depth == 1 else "2.5d"), size, depth

    def _schedules(self, pipeline: int) -> Iterator[tuple[str, int]]:
        if pipeline == 1:
            yield "", 1
        for name, stages_per_rank in SCHEDULES if pipeline > 1 else ():
            if pipeline * stages_per_rank <= self.blocks:
                yield name, stages_per_rank

    def _microbatches(self, data: int, mode: str, tensor: int, depth: int) -> Iterator[int]:
        """Powers of two, or the number that was asked for, that divide a group's batch into parts which the processes
        that shard examples divide in turn."""
        group = self.examples // data
        shards = 1 if mode in ("", "1d") else depth * isqrt(tensor // depth)
        counts = [self.microbatches] if self.microbatches else [2**i for i in range(MOST_MICROBATCHES.bit_length())]
        yield from (count for count in counts if group % (count * shards) == 0)

    def _fits(self, way: Way) -> bool:
        shape = Shape(way.pipeline, way.microbatches, way.stages_per_rank)
        if way.pipeline > 1 and (way.microbatches == 1 or misfit(way.schedule, shape)):
            return False
        return not self.refusal(way)

    def _of_states(self, way: Way) -> Iterator[Way]:
        for home in self.homes:
            for zero in (0, 2, 3) if way.replicas > 1 else (0,):  # 1 is 2, see `runtime.distributed.zero`
                yield replace(way, zero=zero, home=home)


def _divisors(number: int, most: int) -> list[int]:
    return [count for count in range(1, min(number, most) + 1) if number % count == 0]


def in_flight(way: Way) -> np.ndarray:
    """The most microbatches whose activations each rank holds, counted per stage and added up. Without a pipeline these
    are all, since they go through each block one after another."""
    count, behind = way.microbatches * way.stages_per_rank, way.pipeline - np.arange(way.pipeline)
    match way.schedule:
        case "1f1b":
            return np.minimum(count, behind)
        case "interleaved":
            return np.minimum(count, (way.stages_per_rank - 1) * way.pipeline + 2 * behind - 1)
        case "zb1p" | "zbv":
            return np.minimum(count, way.stages) + 0 * behind
        case "roundrobin":
            return 1 + 0 * behind
    return count + 0 * behind
