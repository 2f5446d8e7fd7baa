"""What `geminifx train` does: load model and data, compile, fine-tune, report."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...models.presets import MINI, ModelLoadError, brings_tokenizer, load_model
from ...models.recipe.blocks import Part, TokenBlocks
from ...models.recipe.examples import encode, marks_turns
from ...models.recipe.finetune import check_output, finetune
from ...models.recipe.recipe import Recipe, Report
from ...models.recipe.records import Chat, Fields, Record, Text, plain_texts, read_records, summary
from ...models.recipe.text import embedded_texts, train_tokenizer
from ...runtime.distributed.meeting import launched
from ...runtime.isa.errors import CheckpointError
from ...runtime.isa.mesh import Mesh
from ...runtime.isa.units import format_bytes, parse_seconds
from ...runtime.state_io.checksums import verify
from ...runtime.state_io.leftovers import put_back
from ..api import compile
from ..options import Options
from ..parallel import Parallel, parse_parallel
from .baseline import plain_peak_bytes
from .display import StepProgress, memory_table, perplexity_line
from .launch import is_launched, rank
from .run_directory import RunDirectory, advised

# The defaults for the small model: perplexity falls to an eighth within minutes on two cores.
# Batches are small, so that the training state, not the activations, exceeds the budget.
_MINI_STEPS, _MINI_BATCH, _MINI_SEQ_LEN, _MINI_LR = 400, 4, 128, 2e-3
# Per parameter, in float32: weight, gradient and AdamW's two moments.
_STATE_BYTES = 16
_STEPS, _BATCH, _SEQ_LEN, _RANDOM_LR, _LR = 100, 8, 512, 3e-4, 1e-4


@dataclass(frozen=True)
class TrainOptions:
    """The options of `geminifx train`; None stands for a default that depends on the other options."""

    model: str | None = None
    data: Path | None = None
    fields: str | None = None
    device_budget: str | None = None
    host_budget: str | None = None
    device: str | None = None
    placement: str = "auto"
    precision: str | None = None
    recompute: str = "auto"
    microbatches: str = "auto"
    offload: str = "auto"
    rates: str | None = None
    moments: str = "exact"
    masters: str = "exact"
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    lr: float | None = None
    seed: int = 0
    save_every: str = "0"
    output: Path | None = None
    resume: bool = False
    dump: Path | None = None
    parallel: str | None = None
    nprocs: int | None = None

    @property
    def degrees(self) -> Parallel:
        """Return the parallel degrees that `parallel` declares.

        Raises:
            ValueError: it cannot be parsed.
        """
        return Parallel.of(parse_parallel(self.parallel or ""))

    def mesh(self) -> Mesh:
        """Return the mesh of the running processes, or of those to launch.

        Raises:
            ValueError: the degrees do not multiply to the number of processes.
        """
        count = launched() if is_launched() else self.nprocs
        return self.degrees.mesh(count, count or 1)

    @property
    def directory(self) -> Path:
        """Return where checkpoints go; unless asked for, never the directory that the model came from."""
        if self.output is not None:
            return self.output
        if self.model is None:
            return Path("runs") / MINI
        name = Path(self.model).stem if self.model.endswith(".json") else Path(self.model).name
        return Path("runs") / (f"{name}-tuned" if brings_tokenizer(self.model) else name)

    def words(self) -> list[str]:
        """Return the command line of these options, without `geminifx` itself."""
        words = ["train"] + ([] if self.model is None else [self.model])
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("model", "resume") and value != field.default:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return [*words, "--resume"] if self.resume else words

    def resume_command(self) -> str:
        """Return the command that resumes this run."""
        return shlex.join(["geminifx", *replace(self, resume=True).words()])


@dataclass(frozen=True)
class Job:
    """A model with its tokenizer and data, ready to be compiled and trained."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    records: list[Record]
    blocks: TokenBlocks
    recipe: Recipe


def prepare(options: TrainOptions) -> Job:
    """Load or make model, tokenizer and data; everything that can be refused is checked before the slow parts.

    Raises:
        GeminiError, ValueError, OSError: model, data or settings do not exist or do not fit each other.
    """
    Options.of(_settings(options))
    if options.steps is not None and options.epochs is not None:
        raise ValueError("--steps and --epochs both set the length of the training; leave one of them out")
    advising = advised if options.resume else nullcontext
    with advising():
        source = _source(options)
    check_output(options.directory)
    records = _records(options)
    with advising():
        model = load_model(source, seed=options.seed)
        tokenizer = _tokenizer(source, records, model.config.vocab_size)
    blocks = _blocks(options, source, records, tokenizer, model.config)
    recipe = _recipe(options, blocks)
    _part(options).rows(recipe.batch_size)
    return Job(model, tokenizer, records, blocks, recipe)


def _records(options: TrainOptions) -> list[Record]:
    """Return the records to train on."""
    fields = None if options.fields is None else Fields.parse(options.fields)
    if options.data is not None:
        return read_records(options.data, fields)
    if fields is not None:
        raise ValueError("--fields selects fields of the records in --data; pass both, or neither")
    return [Text("the Python language reference", text) for text in embedded_texts()]


def _tokenizer(source: str, records: list[Record], vocab_size: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer that came with the weights or, for random weights, one trained on the data."""
    own = brings_tokenizer(source)
    return _load_tokenizer(source) if own else train_tokenizer(plain_texts(records), vocab_size)


def _blocks(
    options: TrainOptions,
    source: str,
    records: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> TokenBlocks:
    """Return the records as blocks of --seq-len tokens; by default of as many as the model takes, up to a limit."""
    longest = getattr(config, "max_position_embeddings", None) or _SEQ_LEN
    seq_len = options.seq_len or (_MINI_SEQ_LEN if options.model is None else min(_SEQ_LEN, longest))
    if seq_len > longest:
        raise ValueError(f"--seq-len {seq_len} is longer than the {longest} positions of {source}")
    blocks = TokenBlocks.of(encode(records, tokenizer), tokenizer, seq_len, seed=options.seed)
    if blocks.largest_token >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} produces token {blocks.largest_token}, but the model has only "
            f"{config.vocab_size}; pass a model with its own tokenizer"
        )
    return blocks


def _recipe(options: TrainOptions, blocks: TokenBlocks) -> Recipe:
    """Return how to train; the defaults depend on the model and the data."""
    small = options.model is None
    lr = _MINI_LR if options.model is None else _LR if brings_tokenizer(options.model) else _RANDOM_LR
    batch_size = options.batch_size or (_MINI_BATCH if small else _BATCH)
    if batch_size > len(blocks):
        raise ValueError(
            f"a batch of {batch_size:,} blocks is larger than the training data of {len(blocks):,} blocks; choose a "
            "smaller --batch-size or --seq-len, or provide more data"
        )
    steps = options.steps if options.epochs is None else blocks.steps(options.epochs, batch_size)
    return Recipe(
        output=options.directory,
        steps=steps or (_MINI_STEPS if small else _STEPS),
        batch_size=batch_size,
        lr=lr if options.lr is None else options.lr,
        moments=options.moments,
        masters=options.masters,
        seed=options.seed,
        **_saves(options.save_every),
    )


def run(options: TrainOptions, console: Console) -> Report:
    """Train as `options` say and report on `console`.

    Raises:
        GeminiError, ValueError, OSError: with messages meant for the user.
    """
    job = prepare(options)
    batch = job.blocks.batch(0, job.recipe.batch_size, _part(options))
    _show_job(options, job, console)
    plain_bytes = None
    if options.model is None and options.device in (None, "cpu"):
        plain_bytes = plain_peak_bytes(job.model, batch)
        options = _demonstration(options, job.model, plain_bytes, console)
    compiled = _compile(options, job.model, batch)
    console.print(str(compiled.plan), highlight=False, markup=False, soft_wrap=True)
    progress = StepProgress(console, compiled, job.recipe.steps)
    checkpoints = RunDirectory(compiled, job.tokenizer)
    with progress.shown():
        report = finetune(compiled, job.blocks, job.recipe, checkpoints, resume=options.resume, on_step=progress)
    console.print(perplexity_line(report), highlight=False)
    console.print(memory_table(compiled, plain_bytes))
    return report


def _demonstration(options: TrainOptions, model: PreTrainedModel, plain_bytes: int, console: Console) -> TrainOptions:
    """Return `options` with half of what plain PyTorch needs as the device budget, unless they set one.

    The device is the arena in RAM on every machine: CUDA's own context takes hundreds of megabytes, which would dwarf a
    model this small.
    """
    state = format_bytes(_STATE_BYTES * model.num_parameters())
    console.print(
        f"plain PyTorch needs {format_bytes(plain_bytes)} for this training, "
        f"{state} of it for weights, gradients and AdamW's state",
        highlight=False,
        soft_wrap=True,
    )
    if options.device_budget is None:
        options = replace(options, device_budget=str(plain_bytes // 2))
        console.print(f"the device budget is half of it: {format_bytes(plain_bytes // 2)}", highlight=False)
    return replace(options, device="cpu")


def _compile(options: TrainOptions, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Any:
    """Return the compiled model."""
    return compile(model, example_inputs=batch, **_settings(options))


def _settings(options: TrainOptions) -> dict[str, Any]:
    """Return the arguments of `compile`, except for the batch."""
    names = ("device_budget", "host_budget", "device", "placement", "precision", "recompute", "offload", "rates")
    dump = None if options.dump is None or rank() > 0 else str(options.dump)
    parallel = parse_parallel(options.parallel or "") or None
    asked = options.microbatches
    microbatches = int(asked) if asked.isdecimal() else asked
    rest = {"dump": dump, "parallel": parallel, "microbatches": microbatches}
    return {name: getattr(options, name) for name in names} | rest


def _saves(every: str) -> dict[str, Any]:
    """Return the recipe's argument for how often to save: in steps or in seconds."""
    try:
        return {"save_every": int(every)} if every.isdecimal() else {"save_every_s": parse_seconds(every)}
    except ValueError as error:
        raise ValueError(f"--save-every: {error}, or a number of steps") from None


def _part(options: TrainOptions) -> Part:
    """Return which part of every batch belongs to this process."""
    mesh = options.mesh()
    return Part(mesh.data_rank(rank()), mesh.data_size)


def _show_job(options: TrainOptions, job: Job, console: Console) -> None:
    """Print which model is trained on which data."""
    count = sum(parameter.numel() for parameter in job.model.parameters())
    data = "the Python language reference" if options.data is None else str(options.data)
    blocks = job.blocks
    lines = [
        f"{options.model or MINI}: {count / 1e6:,.1f} M parameters",
        f"{data}: {summary(job.records)}; {len(blocks):,} blocks of {blocks.seq_len} tokens to train on, "
        f"{blocks.held_out_count:,} held out",
    ]
    if options.epochs is not None:
        lines.append(f"{options.epochs} epoch(s) are {job.recipe.steps:,} steps of {job.recipe.batch_size} blocks")
    if any(isinstance(record, Chat) for record in job.records) and not marks_turns(job.tokenizer):
        lines.append(
            "the chat template does not mark the assistant's turns ({% generation %}): all of the chats is learned"
        )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _source(options: TrainOptions) -> str:
    """Return the model to start from, or the directory of the run to resume.

    Raises:
        CheckpointError: the directory is of a saved run and is damaged, or there is no run to resume.
    """
    # Absolute, so that a directory named like a preset is still taken for a directory.
    source = str(put_back(options.directory)) if options.resume else options.model or MINI
    if options.resume and not Path(source).is_dir():
        raise CheckpointError(f"there is no checkpoint to resume in {options.directory}")
    if brings_tokenizer(source):
        verify(Path(source), deep=False)
    return source


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that came with the model."""
    advice = "a trained model needs its own: save it in the same directory with tokenizer.save_pretrained"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for files that it cannot read
        reason = str(error).partition("\n")[0][:200]
        raise ModelLoadError(f"{source} has no tokenizer that can be loaded ({reason}); {advice}") from error
    # Without any files, transformers makes a tokenizer that knows nothing but its special tokens.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelLoadError(f"{source} has no tokenizer; {advice}")
    return tokenizer
