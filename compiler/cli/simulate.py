"""The command `geminifx simulate`: a model's step on a cluster, or a pipeline schedule alone, simulated on a clock."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...runtime.isa.errors import ArgumentError
from ...runtime.isa.units import format_seconds
from ..planner.pipeline.schedules import KINDS, Shape, make_schedule
from ..planner.pipeline.simulate import Simulated, StageCosts, simulate
from ..planner.pipeline.trace import chrome_trace
from ..rates.clusters import CLUSTERS
from . import worlds
from .calibrate import RATES_HELP
from .errors import shown_errors
from .worlds import Asked

MOST_FORWARDS = 2**18
"""The most forwards in a step (stages times microbatches) to simulate; takes about a minute."""

commands = typer.Typer()


def summary(simulated: Simulated) -> str:
    return f"a step takes {format_seconds(simulated.step_s)}, of which ranks are idle for {simulated.bubble:.1%}"


def ranks_table(simulated: Simulated) -> Table:
    """Which stages each rank runs, how long it idles, and how many microbatches it has in flight."""
    table = Table("rank", "stages", "idle", "microbatches in flight")
    for rank, idle_s in enumerate(simulated.idle_s):
        stages = ", ".join(map(str, simulated.schedule.stages_of(rank)))
        table.add_row(str(rank), stages, format_seconds(idle_s), str(simulated.in_flight[rank]))
    return table


def _simulated(name: str, shape: Shape, costs: StageCosts, loss_awaited: bool) -> Simulated:
    """Simulates a schedule. Raises ValueError if that would take too long or the shape does not fit the schedule."""
    forwards = shape.stages * shape.microbatches
    if forwards > MOST_FORWARDS:
        raise ValueError(f"{shape.stages} stages with {shape.microbatches} microbatches need {forwards:,} forwards; "
                         f"expected {MOST_FORWARDS:,} or fewer")  # fmt: skip
    return simulate(make_schedule(name, shape), [costs] * shape.stages, loss_awaited=loss_awaited)


OF_SCHEDULES = ("ranks", "stages_per_rank", "forward_ms", "input_ms", "weight_ms", "message_ms", "loss_awaited")
OF_MODELS = ("world_size", "cluster", "rates", "device_budget", "parallel", "batch_size", "seq_len")


def _check_of_one_kind(context: typer.Context, model: str | None) -> None:
    """Raises ArgumentError for an option that only applies to the other of the two: a model, or a schedule alone."""
    others, instead = (
        (OF_MODELS, "a schedule alone; name a MODEL") if model is None else (OF_SCHEDULES, "a model; leave it out")
    )
    given = [name for name in others if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        raise ArgumentError(f"--{given[0].replace('_', '-')} does not apply to {instead}")


@commands.command("simulate")
def simulate_command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub name, directory, config file (.json) or preset; without it, only a schedule is simulated."
        ),
    ] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Processes that share MODEL's work.")] = None,
    parallel: Annotated[
        str | None, typer.Option(help="How they share it, such as pipeline=4,data=2; by default the fastest way.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help=f"The cluster: {', '.join(CLUSTERS)}, or a TOML file.")] = None,
    rates: Annotated[str | None, typer.Option(help=RATES_HELP)] = None,
    device_budget: Annotated[str | None, typer.Option(help="Device memory of each process, such as 24GB.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples in a step, over all processes.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per example.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help=f"The schedule: {', '.join(KINDS)}; with MODEL also roundrobin.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the pipeline.")] = 4,
    microbatches: Annotated[int | None, typer.Option(min=1, help="Microbatches in a step; 8 without MODEL.")] = None,
    stages_per_rank: Annotated[int, typer.Option(min=1, help="Stages on each rank.")] = 1,
    forward_ms: Annotated[float, typer.Option(min=0, help="Time of a stage's forward for one microbatch.")] = 1.0,
    input_ms: Annotated[float, typer.Option(min=0, help="Time of the gradients of its inputs.")] = 1.0,
    weight_ms: Annotated[float, typer.Option(min=0, help="Time of the gradients of its weights.")] = 1.0,
    message_ms: Annotated[float, typer.Option(min=0, help="Time of a message from one rank to another.")] = 0.0,
    loss_awaited: Annotated[
        bool, typer.Option(help="Whether the loop reads the loss before it calls backward().")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write the timeline to this file, for chrome://tracing or ui.perfetto.dev.")
    ] = None,
) -> None:
    """Simulate a step: what each rank does when, how long it idles, how much it holds.

    With MODEL: its blocks are priced by what they compute, read and exchange; nothing is run. Without MODEL: a step of
    a pipeline alone, whose stages take the times given by the options. F0.3 is stage 0's forward of microbatch 3, B0.3
    its backward, I0.3 and W0.3 the two parts of a divided backward.
    """
    console = Console()
    with shown_errors():
        _check_of_one_kind(context, model)
        if model is not None:
            asked = Asked(
                model, world_size, cluster, rates, device_budget, parallel, schedule, microbatches, batch_size, seq_len
            )
            _show_world(console, asked, trace)
            return
        costs = StageCosts(
            forward_s=forward_ms / 1e3,
            input_s=input_ms / 1e3,
            weight_s=weight_ms / 1e3,
            backward_s=(input_ms + weight_ms) / 1e3,
            message_s=message_ms / 1e3,
        )
        shape = Shape(ranks, microbatches or 8, stages_per_rank)
        simulated = _simulated(schedule or "1f1b", shape, costs, loss_awaited)
        console.print(str(simulated.schedule), highlight=False, markup=False, soft_wrap=True)
        console.print(summary(simulated), highlight=False, markup=False, soft_wrap=True)
        console.print(ranks_table(simulated))
        if trace is not None:
            trace.write_text(chrome_trace(simulated), encoding="utf-8")


def _show_world(console: Console, asked: Asked, trace: Path | None) -> None:
    priced, lines = asked.simulated()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(worlds.ranks_table(priced))
    if trace is not None:
        worlds.write_trace(priced, trace)
