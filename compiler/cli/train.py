"""The command `geminifx train`: its options, the processes it starts, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args

import transformers
import typer
from rich.console import Console
from typer.core import TyperCommand

from ...models.recipe.records import GRAMMAR as GRAMMAR_OF_FIELDS
from ...runtime.isa.moments import Masters, Moments
from ..parallel import GRAMMAR
from .calibrate import RATES_HELP
from .errors import shown_errors
from .job import TrainOptions, run
from .launch import is_launched, launch, rank
from .run_directory import holds_run

INTERRUPTED = 130

commands = typer.Typer()


class Resume(StrEnum):
    """Whether to resume the run in --output: never, always, or if there is one."""

    NEVER = "never"
    ALWAYS = "always"
    AUTO = "auto"


class _Command(TyperCommand):
    """A command whose --resume may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._with_value(args)))

    @staticmethod
    def _with_value(args: list[str]) -> Iterator[str]:
        for word, following in pairwise([*args, ""]):
            is_alone = word == "--resume" and following not in list(Resume)
            yield f"--resume={Resume.ALWAYS}" if is_alone else word


@commands.command(cls=_Command)
def train(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub name, directory, config file (.json) or preset (opt-125m ... opt-66b)."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A file of text (.txt, .md) or records (.jsonl, .json, .csv), or a folder.")
    ] = None,
    fields: Annotated[str | None, typer.Option(help=f"Fields of records to learn from: {GRAMMAR_OF_FIELDS}.")] = None,
    device_budget: Annotated[str | None, typer.Option(help='Device memory, such as "24GB", "24GiB" or "80%".')] = None,
    host_budget: Annotated[str | None, typer.Option(help="Host memory, in the same form.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, or cpu for a budgeted arena in RAM.")] = None,
    placement: Annotated[str, typer.Option(help="Where parameters live: auto, cpu or cuda.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default what suits the device.")] = None,
    recompute: Annotated[str, typer.Option(help="Recompute activations: auto, all or none.")] = "auto",
    microbatches: Annotated[str, typer.Option(help="Number of parts that a batch runs in, or auto.")] = "auto",
    offload: Annotated[str, typer.Option(help="Offload activations to the host: auto, all or none.")] = "auto",
    rates: Annotated[str | None, typer.Option(help=RATES_HELP)] = None,
    moments: Annotated[
        str, typer.Option(help=f"How AdamW's moments are stored: {', '.join(get_args(Moments))}.")
    ] = "exact",
    masters: Annotated[
        str, typer.Option(help=f"How bfloat16 weights' masters are kept: {', '.join(get_args(Masters))}.")
    ] = "exact",
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data, instead of --steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per example.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    save_every: Annotated[
        str, typer.Option(help='Between checkpoints: steps, or time such as "10min"; 0: only the last.')
    ] = "0",
    output: Annotated[
        Path | None, typer.Option(help="Directory for the checkpoint; an earlier one is replaced.")
    ] = None,
    resume: Annotated[
        Resume,
        typer.Option(help="Continue from the checkpoint in --output; auto: if there is one. Without a value: always."),
    ] = Resume.NEVER,
    dump: Annotated[Path | None, typer.Option(help="Write the program after every pass to this directory.")] = None,
    parallel: Annotated[str | None, typer.Option(help=f"How processes share the work: {GRAMMAR}.")] = None,
    nprocs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to start on this machine; by default as many as --parallel takes."),
    ] = None,
) -> None:
    """Fine-tune MODEL within a memory budget.

    Without MODEL: a small OPT with random weights, in half the memory that plain PyTorch needs for it. Without --data:
    the language reference that comes with every Python. Ctrl-C and SIGTERM save a checkpoint to resume from. With
    --resume auto, the same command starts a run and resumes it, as torchrun's --max-restarts requires. Several
    processes each compute their part of every batch of --batch-size; torchrun may start them, too.
    """
    options = TrainOptions(
        model=model,
        data=data,
        fields=fields,
        device_budget=device_budget,
        host_budget=host_budget,
        device=device,
        placement=placement,
        precision=precision,
        recompute=recompute,
        microbatches=microbatches,
        offload=offload,
        rates=rates,
        moments=moments,
        masters=masters,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        seed=seed,
        save_every=save_every,
        output=output,
        resume=resume is Resume.ALWAYS,
        dump=dump,
        parallel=parallel,
        nprocs=nprocs,
    )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(quiet=rank() > 0)
    with shown_errors():
        if resume is Resume.AUTO:
            options = replace(options, resume=holds_run(options.directory))
        world = options.mesh().size
        if world > 1 and not is_launched():
            raise typer.Exit(launch(options.words(), world))
        report = run(options, console)
    if rank() > 0:
        return
    if report.interrupted:
        done = report.first_step + len(report.losses)
        console.print(f"stopped after step {done} and saved; continue with", highlight=False)
        console.print(f"  {options.resume_command()}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    console.print(f"saved to {options.directory}", highlight=False, markup=False, soft_wrap=True)
