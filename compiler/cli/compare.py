"""The command `geminifx compare`: the tensor parallel modes side by side, by memory and communication per process."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from ...models.adapters import example_inputs
from ...models.presets import empty_model
from ...passes.program.plan import Plan
from ...runtime.isa.errors import BudgetError, CaptureError, ShardingError
from ...runtime.isa.units import format_bytes, format_seconds
from ..api import compile
from ..rates.choice import OTHER_CARD
from .calibrate import RATES_HELP
from .errors import shown_errors

ANY_HOST_BYTES = 2**60
"""Host budget of a comparison: effectively unlimited, as the machines compared are not this one."""

MOST_PROCESSES, MOST_EXAMPLES = 2**14, 2**24
"""More than any machine has, yet small enough that sizes can be computed."""

commands = typer.Typer()


@dataclass(frozen=True)
class Compared:
    """One way to divide the work: its name, and either its plan or the reason why there is none."""

    name: str
    plan: Plan | None
    refusal: str = ""


def ways(world_size: int) -> dict[str, Mapping[str, Any]]:
    """The values of `parallel=` for `world_size` processes: data parallel, and each tensor parallel mode that fits."""
    found: dict[str, Mapping[str, Any]] = {"data": {"data": world_size}}
    found["data, ZeRO 3"] = {"data": world_size, "zero": 3}
    found["1d"] = {"tensor": {"mode": "1d", "size": world_size}}
    found["1d, sequence"] = {"tensor": {"mode": "1d", "size": world_size, "sequence": True}}
    if isqrt(world_size) ** 2 == world_size:
        found["2d"] = {"tensor": {"mode": "2d", "size": world_size}}
    for depth in range(2, world_size // 4 + 1):
        if world_size % depth == 0 and isqrt(world_size // depth) ** 2 == world_size // depth:
            found[f"2.5d, depth {depth}"] = {"tensor": {"mode": "2.5d", "size": world_size, "depth": depth}}
    if round(world_size ** (1 / 3)) ** 3 == world_size:
        found["3d"] = {"tensor": {"mode": "3d", "size": world_size}}
    return found


def compare_ways(model: nn.Module, world_size: int, batch: Mapping[str, Any], **options: Any) -> list[Compared]:
    """Plan `model`, which may be on `meta`, for `world_size` processes in each way; `batch` is the global batch."""
    found = []
    for name, parallel in ways(world_size).items():
        parts = parallel.get("data", 1)
        rows = len(next(iter(batch.values())))
        if rows % parts:
            found.append(Compared(name, None, f"a batch of {rows} is not divisible by {parts}"))
            continue
        mine = {key: value[: rows // parts] for key, value in batch.items()}
        try:
            compiled = compile(model, world_size=world_size, parallel=parallel, example_inputs=mine, **options)
            found.append(Compared(name, compiled.plan))
        except (BudgetError, CaptureError, ShardingError) as refusal:
            found.append(Compared(name, None, str(refusal).partition(";")[0]))
    return found


def comparison_table(compared: list[Compared], world_size: int) -> Table:
    """Bytes per process and step, and modelled seconds per step."""
    rates = next((f" at the rates of {way.plan.estimate.rates}" for way in compared if way.plan is not None), "")
    table = Table(
        "parallel", "device peak", "activations", "step", "received", "by axis",
        title=f"{world_size} processes, each{rates}",
    )  # fmt: skip
    for way in compared:
        if way.plan is None:
            table.add_row(way.name, "-", "-", "-", "-", way.refusal)
            continue
        received: dict[str, int] = {}
        for collective in way.plan.estimate.collectives:
            received[collective.axis] = received.get(collective.axis, 0) + collective.received_bytes
        activations = dict(way.plan.estimate.at_peak).get("activations", 0)
        by_axis = ", ".join(f"{axis} {format_bytes(num_bytes)}" for axis, num_bytes in received.items())
        table.add_row(
            way.name, format_bytes(way.plan.peak_bytes), format_bytes(activations),
            format_seconds(way.plan.estimate.step_s), format_bytes(sum(received.values())), by_axis,
        )  # fmt: skip
    return table


def batch_by_shapes(model: PreTrainedModel, batch_size: int, seq_len: int | None) -> dict[str, torch.Tensor]:
    """A step's inputs on `meta`: plans read only their shapes, and a global batch may be large.

    Raises:
        ValueError: the model's inputs are unknown, or `seq_len` exceeds the model's positions.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if seq_len is not None and longest is not None and seq_len > longest:
        raise ValueError(f"--seq-len {seq_len} is longer than the {longest} positions of the model")
    examples = example_inputs(model, 1, seq_len)
    if examples is None:
        raise ValueError(f"{type(model).__name__} does not take tokens as input; expected a language model")
    sizes = {name: (batch_size, *example.shape[1:]) for name, example in examples.items()}
    return {name: torch.empty(sizes[name], dtype=examples[name].dtype, device="meta") for name in sizes}


@commands.command()
def compare(
    model: Annotated[str, typer.Argument(help="Hub name, directory, config file (.json) or preset.")] = "opt-1.3b",
    world_size: Annotated[int, typer.Option(min=2, max=MOST_PROCESSES, help="Processes that share the work.")] = 8,
    batch_size: Annotated[
        int, typer.Option(min=1, max=MOST_EXAMPLES, help="Examples in a step, over all processes.")
    ] = 16,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per example.")] = None,
    device_budget: Annotated[str | None, typer.Option(help="Device memory of each process, such as 24GB.")] = None,
    recompute: Annotated[str, typer.Option(help="Recompute activations: auto, all or none.")] = "auto",
    rates: Annotated[str, typer.Option(help=RATES_HELP)] = OTHER_CARD,
) -> None:
    """Plan MODEL for several processes in every tensor parallel mode, and show memory and communication of each.

    Nothing is run: a machine without a GPU will do, for any number of processes.
    """
    transformers.utils.logging.set_verbosity_error()
    with shown_errors():
        loaded = empty_model(model)
        batch = batch_by_shapes(loaded, batch_size, seq_len)
        settings = {"device": "cpu", "precision": "bf16", "recompute": recompute, "device_budget": device_budget,
                    "rates": rates}  # fmt: skip
        compared = compare_ways(loaded, world_size, batch, host_budget=ANY_HOST_BYTES, **settings)
    Console().print(comparison_table(compared, world_size))
