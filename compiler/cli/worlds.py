"""Simulates a model's step on a cluster, both as described on the command line."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
import transformers
from rich.table import Table

from ...models.adapters import blocks
from ...models.presets import empty_model
from ...runtime.isa.errors import ArgumentError
from ...runtime.isa.schedule import ROUND_ROBIN
from ...runtime.isa.units import format_bytes, format_seconds, parse_bytes
from ..capture.trace import CaptureRequest
from ..memory.device import HOST_SHARE
from ..parallel import Parallel, cannot_run, parse_parallel
from ..planner.pipeline.schedules import KINDS, Shape, misfit
from ..planner.pipeline.trace import chrome_trace
from ..planner.world.costs import Priced
from ..planner.world.model import Model
from ..planner.world.search import choose, told, weigh
from ..planner.world.ways import Space, Way
from ..planner.world.world import World
from ..rates.choice import OTHER_CARD, given_rates
from ..rates.clusters import Cluster, given_cluster, one_node
from ..rates.presets import preset
from .compare import batch_by_shapes


@dataclass(frozen=True)
class Asked:
    """A request to simulate a model's step.

    Fields:
        model: hub name, directory, config file or preset.
        world_size: number of processes.
        cluster: one of the known clusters or a TOML file; None is a single node.
        rates: a card or a rates file; None takes the cluster's.
        device_budget: of each process, such as "24GB".
        parallel: how processes share the work; None or "auto" lets the planner choose.
        schedule, microbatches: how the pipeline runs; None for defaults, or for the planner to choose.
        batch_size: examples in a step, over all processes.
        seq_len: tokens per example.
    """

    model: str
    world_size: int | None = None
    cluster: str | None = None
    rates: str | None = None
    device_budget: str | None = None
    parallel: str | None = None
    schedule: str | None = None
    microbatches: int | None = None
    batch_size: int | None = None
    seq_len: int | None = None

    def simulated(self) -> tuple[Priced, tuple[str, ...]]:
        """The simulated way of sharing the work, and lines to print about it. Raises ArgumentError for contradictory
        options, BudgetError if memory is too small."""
        transformers.utils.logging.set_verbosity_error()
        cluster, loaded = self._cluster(), empty_model(self.model)
        batch = batch_by_shapes(loaded, 1, self.seq_len)
        model = Model.of(loaded, ((), batch), CaptureRequest(torch.bfloat16))
        world = self._world(cluster)
        if self.parallel in (None, "auto"):
            if self.schedule is not None:
                raise ArgumentError("--schedule orders the pipeline of --parallel; leave it out to have one chosen")
            space = Space(
                cluster.size,
                world.examples,
                len(blocks(loaded)) if model.makes_its_loss else 0,
                model.heads,
                self.microbatches,
            )
            plan = choose(model, world, space)
            return plan.chosen, plan.lines()
        way = self._way(world, len(model.parts), model.heads)
        why_not = cannot_run(Parallel.of(way.degrees()), way.microbatches, way.schedule)
        priced = weigh(model, world, way, ("host",) if way.schedule == ROUND_ROBIN else ("device", "host"))
        lines = (f"of {cluster.size} processes on {cluster}: {told(priced)}",)
        return priced, (*lines, *([f"it is modelled, and not run yet: {why_not}"] if why_not else []))

    def _cluster(self) -> Cluster:
        described, rates = given_cluster(self.cluster), given_rates(self.rates)
        if described is None:
            rates = rates or preset(OTHER_CARD)
            node = one_node(self.world_size or self._declared() or 8, rates)
            return Cluster(f"one node of {node.size} of {rates.name}", 1, node.size, rates, node.within, node.between)
        if self.world_size not in (None, described.size):
            raise ArgumentError(f"--world-size {self.world_size}, but the cluster has {described.size} devices")
        return described

    def _declared(self) -> int | None:
        """The number of processes that --parallel declares, or None if it leaves the data degree open."""
        parallel = Parallel.of(parse_parallel("" if self.parallel in (None, "auto") else str(self.parallel)))
        return None if parallel.data is None else prod((parallel.data, parallel.size, parallel.pipeline))

    def _world(self, cluster: Cluster) -> World:
        """The world to plan for; each device's process may use an equal share of the host memory, if that is known."""
        rates = given_rates(self.rates) or cluster.rates or preset(OTHER_CARD)
        budget = None if self.device_budget is None else parse_bytes(self.device_budget)
        host_bytes = None if cluster.host_bytes is None else int(cluster.host_bytes * HOST_SHARE) // cluster.devices
        return World(cluster, rates, self.batch_size or cluster.size, budget, host_bytes)

    def _way(self, world: World, count: int, heads: int) -> Way:
        """The declared way of sharing the work. Raises ArgumentError if it does not fit world, batch or model."""
        parallel = Parallel.of(parse_parallel(str(self.parallel)))
        data = parallel.mesh(world.cluster.size, 1).data_size
        microbatches = self.microbatches or (2 * parallel.pipeline if parallel.is_staged else 1)
        way = Way.of(parallel, data, microbatches, self.schedule or "")
        unknown = [name for name in ("sequence", "table") if getattr(parallel, name)]
        if way.mode == "3d" or unknown:
            what = "the mode 3d" if way.mode == "3d" else f"tensor={', '.join(unknown)}"
            raise ArgumentError(f"{what} is not modelled here; use geminifx compare")
        if self.schedule and way.pipeline == 1:
            raise ArgumentError(f"--schedule {self.schedule} is for a pipeline, but --parallel has none; leave it out")
        if way.mode == "1d" and heads % way.tensor:
            raise ArgumentError(f"{heads} heads cannot be divided over {way.tensor} processes; choose another size")
        if world.examples % (data * microbatches):
            raise ArgumentError(
                f"a step of {world.examples} examples cannot be divided into {data} batches of {microbatches} "
                "microbatches; choose another --batch-size or --microbatches"
            )
        if way.schedule == ROUND_ROBIN and way.pipeline > 1:
            return replace(way, stages_per_rank=count)
        if way.stages > count:
            raise ArgumentError(
                f"{way.stages} stages need at least {way.stages} blocks, but the model has {count}; choose fewer stages"
            )
        if way.schedule and way.schedule not in KINDS:
            raise ArgumentError(
                f"there is no schedule {way.schedule!r}; expected one of {', '.join((*KINDS, ROUND_ROBIN))}"
            )
        why_not = misfit(way.schedule, Shape(way.pipeline, microbatches, way.stages_per_rank)) if way.schedule else ""
        if why_not:
            raise ArgumentError(f"the schedule {way.schedule} does not fit: {why_not}")
        return way


def ranks_table(priced: Priced) -> Table:
    """What each rank of the pipeline does and holds; its data and tensor parallel peers do and hold the same."""
    table = Table("rank of the pipeline", "stages", "idle", "sums and updates", "device peak")
    run = priced.simulated
    for rank, num_bytes in enumerate(priced.rank_bytes):
        stages = "" if run is None else ", ".join(map(str, run.schedule.stages_of(rank)))
        idle = "" if run is None else format_seconds(run.idle_s[rank])
        table.add_row(str(rank), stages, idle, format_seconds(priced.tail_s[rank]), format_bytes(num_bytes))
    return table


def write_trace(priced: Priced, path: Path) -> None:
    assert priced.simulated is not None
    path.write_text(chrome_trace(priced.simulated, priced.tail_s), encoding="utf-8")
