"""Fine-tuning: AdamW, warm-up and linear decay, clipping, held-out perplexity, resumable checkpoints.

It takes a compiled model, or anything else that is `Trainable`, and does not compile.
"""

from __future__ import annotations

import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ...runtime.isa.errors import BudgetError, CheckpointError, GeminiError
from .blocks import Part, TokenBlocks
from .recipe import Recipe, Report, StepInfo
from .run_state import RunState, random_states, restore_random_states, seed_generators
from .trainable import Checkpoints, Processes, Saving, Trainable

STOPS = (signal.SIGINT, signal.SIGTERM)
"""Signals that end a run once the current step is done and saved."""


class NonFiniteLoss(GeminiError):  # noqa: N818
    """The loss or the gradient of a step is infinite or NaN; names the step and the module."""


class _Interrupt:
    """While entered, Ctrl-C or SIGTERM only requests a stop after the step. A second Ctrl-C stops at once; a second
    SIGTERM does not, as schedulers send several."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        # Only the main thread may set signal handlers.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in STOPS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class _Saves:
    """The checkpoints of a run, one at a time. `write` starts saving a step, in the background or not."""

    def __init__(self, recipe: Recipe, write: Callable[[int, bool], Saving]) -> None:
        self._recipe, self._write = recipe, write
        self._step, self._began_s = 0, time.perf_counter()
        self._under_way: Saving | None = None

    def is_due(self, step: int) -> bool:
        """Return whether to save a checkpoint now that `step` steps are done."""
        return self._recipe.is_due(step, time.perf_counter() - self._began_s)

    def is_done(self) -> bool:
        """Return whether the last save has ended, in success or failure, and nobody has called `finish` since."""
        return self._under_way is not None and self._under_way.done()

    def save(self, step: int, *, background: bool) -> None:
        """Save `step`, once the previous save has ended.

        Raises:
            CheckpointError: this or the previous save failed; says which step is lost and how to go on. If it was the
                previous one, this save is made all the same.
        """
        try:
            self.finish()
        finally:
            self._step = step
            with self._telling():
                self._under_way = self._write(step, background)
            self._began_s = time.perf_counter()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: it failed.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            with self._telling():
                under_way.result()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(
                f"step {self._step} was not saved: {error}; free some space (or choose another --output) and continue "
                "from the last checkpoint with --resume"
            ) from error


def finetune(
    model: Trainable,
    blocks: TokenBlocks,
    recipe: Recipe,
    checkpoints: Checkpoints,
    *,
    resume: bool = False,
    on_step: Callable[[StepInfo], None] | None = None,
) -> Report:
    """Train `model` on `blocks`; save it, its optimizer and the run's state through `checkpoints` to `recipe.output`.

    With `resume`, continue from what `recipe.output` holds: losses are then those of a run that never stopped. The
    first Ctrl-C or SIGTERM finishes the step and saves. Checkpoints during the run are written in the background.

    Several processes that train one model all call this; each computes its part of every batch, and all have the same
    losses. A run may be resumed by a different number of processes; dropout, if any, is then drawn differently.

    Raises:
        NonFiniteLoss: a loss or gradient is not finite; the step's update has not been made.
        CheckpointError: a checkpoint cannot be written, or the one to resume does not belong to this run.
        ValueError: `recipe.output` holds something other than a checkpoint.
    """
    ranks, part, data = model.ranks, _part(model), blocks.fingerprint()
    with ranks.failing_alike():
        check_output(recipe.output)
    ranks.check_alike("the data", data)
    ranks.check_alike("where to begin, at a checkpoint or anew,", str(resume))
    optimizer = make_optimizer(model, recipe)
    if resume:
        first, before = _resume(model, optimizer, recipe, checkpoints, data)
    else:
        seed_generators(recipe.seed + part.number)
        first, before = 0, perplexity(model, blocks, recipe)

    def write(step: int, background: bool) -> Saving:
        state = RunState(step, recipe.curve(), data, before, str(ranks.mesh), ranks.gather(random_states()))
        return checkpoints.save(recipe.output, optimizer, state.extra(), background=background)

    saves = _Saves(recipe, write)
    losses, began_s = list[float](), time.perf_counter()
    with _Interrupt() as interrupt:
        for step in range(first, recipe.steps):
            stops, is_due, is_saved = _asked(ranks, interrupt.requested, saves.is_due(step), saves.is_done())
            if stops:
                break
            if is_saved:
                saves.finish()
            if is_due and losses:
                saves.save(step, background=True)
            info = _step(model, optimizer, blocks.batch(step, recipe.batch_size, part), step, recipe)
            losses.append(info.loss)
            if on_step is not None:
                on_step(info)
        train_s = time.perf_counter() - began_s
        done = first + len(losses)
        if losses or not resume:
            saves.save(done, background=False)
        after = perplexity(model, blocks, recipe) if done == recipe.steps else None
    tokens = len(losses) * recipe.batch_size * blocks.seq_len
    return Report(first, tuple(losses), tokens / max(train_s, 1e-9), before, after)


def _asked(ranks: Processes, *wishes: bool) -> list[bool]:
    """Return, for each wish, whether any process has it: clocks and signals differ between them."""
    return [any(theirs) for theirs in zip(*ranks.gather(wishes), strict=True)]


def _part(model: Trainable) -> Part:
    """Return which part of every batch belongs to this process."""
    return Part(model.ranks.data_rank, model.ranks.mesh.data_size)


def make_optimizer(model: Trainable, recipe: Recipe) -> Any:
    """Return the model's AdamW over the trainable parameters; biases and norms, which are vectors, do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return model.optimizer(
        torch.optim.AdamW,
        groups,
        lr=recipe.lr,
        betas=(0.9, 0.95),
        max_grad_norm=recipe.max_grad_norm,
        moments=recipe.moments,
        masters=recipe.masters,
        seed=recipe.seed,
    )


def perplexity(model: Trainable, blocks: TokenBlocks, recipe: Recipe) -> float:
    """Return the perplexity on what held-out blocks teach, in evaluation mode; leaves the model in training mode."""
    model.train(False)
    with torch.no_grad():
        batches = blocks.held_out_batches(recipe.batch_size, recipe.held_out_batches, _part(model))
        losses = [(float(model(**batch).loss), learned) for batch, learned in batches]
    model.train()
    mean = sum(loss * learned for loss, learned in losses) / sum(learned for _, learned in losses)
    return math.exp(mean) if mean < 700 else mean * math.inf


def _step(model: Trainable, optimizer: Any, batch: dict[str, torch.Tensor], step: int, recipe: Recipe) -> StepInfo:
    """Do one step. Raises NonFiniteLoss instead of making an update that would destroy the weights."""
    began_s = time.perf_counter()
    lr = recipe.lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = model(**batch).loss
    value = loss.item()
    if not math.isfinite(value):
        del loss  # and the step's activations with it: the search needs their memory
        raise _non_finite("loss", value, step, model, batch)
    loss.backward()
    norm = float(optimizer.gradient_norm())
    if not math.isfinite(norm) and optimizer.loss_scale == 1.0:  # if scaled, the optimizer skips the step itself
        raise _non_finite("norm of the gradient", norm, step, model, batch)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = batch["labels"].numel() * model.ranks.mesh.data_size
    return StepInfo(step + 1, value, norm, lr, tokens, time.perf_counter() - began_s)


def _non_finite(what: str, value: float, step: int, model: Trainable, batch: dict[str, torch.Tensor]) -> NonFiniteLoss:
    """Return an error that names the step and the first module to produce a non-finite value."""
    try:
        module = model.first_nonfinite(**batch)
    except BudgetError:
        where = "the budget leaves too little memory to search for the module"
    else:
        where = (
            "every value of the forward is finite, so it comes from the backward"
            if module is None
            else f"the first value that is not finite comes from {module}"
        )
    return NonFiniteLoss(
        f"the {what} of step {step + 1} is {value}; {where}. The update of this step was not applied. A smaller --lr "
        "usually helps"
    )


def _resume(model: Trainable, optimizer: Any, recipe: Recipe, checkpoints: Checkpoints, data: str) -> tuple[int, float]:
    """Restore model, optimizer and generators; return the steps done and the perplexity at the run's start.

    Raises:
        CheckpointError: there is nothing to resume.
        ValueError: settings or data differ from those of the saved run; nothing has been loaded then.
    """
    ranks = model.ranks
    saved = checkpoints.open(recipe.output)
    state = RunState.of(saved.extra, recipe.output)
    state.check(recipe, data)
    saved.load(optimizer)
    if state.mesh == str(ranks.mesh):
        restore_random_states(state.random[ranks.rank])
    else:
        # Ranks that share a batch must draw the same numbers; others, of which there may be more now, must not.
        seed_generators(recipe.seed + state.step + ranks.data_rank)
    return state.step, state.perplexity_before


def check_output(output: Path) -> None:
    """Make sure, before any work, that `output` is writable and that saving would replace nothing but a checkpoint.

    Raises:
        ValueError: it is a file, or holds something other than a checkpoint.
        CheckpointError: it cannot be written to.
    """
    if output.is_dir():
        if any(output.iterdir()) and not (output / "config.json").is_file():
            raise ValueError(
                f"{output} contains files that are not a checkpoint, and saving would replace them; choose a new "
                "--output"
            )
    elif output.exists():
        raise ValueError(f"{output} is a file; expected a directory for --output")
    there = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written to ({error}); choose another --output") from error
