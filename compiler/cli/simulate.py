"""The command `geminifx simulate`: a schedule of a pipeline on a clock, and its timeline as a trace."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...runtime.isa.units import format_seconds
from ..planner.pipeline.schedules import KINDS, Shape, make_schedule
from ..planner.pipeline.simulate import Simulated, StageCosts, simulate
from ..planner.pipeline.trace import chrome_trace
from .errors import shown_errors

MOST_FORWARDS = 2**18
"""Of all stages in a step: within a minute."""

commands = typer.Typer()


def summary(simulated: Simulated) -> str:
    return f"a step takes {format_seconds(simulated.step_s)}, of which ranks are idle for {simulated.bubble:.1%}"


def ranks_table(simulated: Simulated) -> Table:
    """What each rank is there for, and how much of a step it has nothing to do."""
    table = Table("rank", "stages", "idle", "microbatches in flight")
    for rank, idle_s in enumerate(simulated.idle_s):
        stages = ", ".join(map(str, simulated.schedule.stages_of(rank)))
        table.add_row(str(rank), stages, format_seconds(idle_s), str(simulated.in_flight[rank]))
    return table


def _simulated(name: str, shape: Shape, costs: StageCosts, loss_awaited: bool) -> Simulated:
    """Raises ValueError where that would take too long, or the shape does not fit the schedule."""
    forwards = shape.stages * shape.microbatches
    if forwards > MOST_FORWARDS:
        raise ValueError(f"{shape.stages} stages with {shape.microbatches} microbatches make {forwards:,} forwards; "
                         f"expected {MOST_FORWARDS:,} or fewer")  # fmt: skip
    return simulate(make_schedule(name, shape), [costs] * shape.stages, loss_awaited=loss_awaited)


@commands.command("simulate")
def simulate_command(
    schedule: Annotated[str, typer.Option(help=f"Which rank does what when: {', '.join(KINDS)}.")] = "1f1b",
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that the stages lie on.")] = 4,
    microbatches: Annotated[int, typer.Option(min=1, help="Microbatches of a step.")] = 8,
    stages_per_rank: Annotated[int, typer.Option(min=1, help="Stages on each rank.")] = 1,
    forward_ms: Annotated[float, typer.Option(min=0, help="A stage's forward of a microbatch.")] = 1.0,
    input_ms: Annotated[float, typer.Option(min=0, help="Gradients of its inputs.")] = 1.0,
    weight_ms: Annotated[float, typer.Option(min=0, help="Gradients of its weights.")] = 1.0,
    message_ms: Annotated[float, typer.Option(min=0, help="From one rank to another.")] = 0.0,
    loss_awaited: Annotated[
        bool, typer.Option(help="Whether the loop reads the loss before it calls backward().")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write the timeline here, for chrome://tracing or ui.perfetto.dev.")
    ] = None,
) -> None:
    """Run a step of a pipeline on a clock: what each rank does, how long it idles, how much it holds.

    F0.3 is stage 0's forward of microbatch 3, B0.3 its backward, I0.3 and W0.3 the two parts of a divided one.
    """
    console = Console()
    with shown_errors():
        costs = StageCosts(
            forward_s=forward_ms / 1e3,
            input_s=input_ms / 1e3,
            weight_s=weight_ms / 1e3,
            backward_s=(input_ms + weight_ms) / 1e3,
            message_s=message_ms / 1e3,
        )
        simulated = _simulated(schedule, Shape(ranks, microbatches, stages_per_rank), costs, loss_awaited)
        console.print(str(simulated.schedule), highlight=False, markup=False, soft_wrap=True)
        console.print(summary(simulated), highlight=False, markup=False, soft_wrap=True)
        console.print(ranks_table(simulated))
        if trace is not None:
            trace.write_text(chrome_trace(simulated), encoding="utf-8")
