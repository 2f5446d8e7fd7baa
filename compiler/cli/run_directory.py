"""The contents of `geminifx train`'s --output: the model for other programs, and the state to resume from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from ...models.presets import ModelLoadError
from ...runtime.isa.errors import CheckpointError
from ...runtime.state_io.background import Copying, Saving
from ...runtime.state_io.leftovers import put_back
from ...runtime.state_io.sharded import replacing, write
from ..checkpoint import OpenCheckpoint, checkpoint_contents, open_checkpoint
from ..module import CompiledModule

STATE = "state"
"""The folder in --output with a checkpoint like `geminifx.save_checkpoint`'s; model and tokenizer lie beside it."""


@contextmanager
def advised() -> Iterator[None]:
    """Adds advice to the errors of a run that cannot be resumed."""
    try:
        yield
    except (CheckpointError, ModelLoadError) as error:
        raise CheckpointError(f"{error}; start the run without --resume") from error


def holds_run(directory: Path) -> bool:
    """Return whether `directory` holds a run to resume, whole or damaged."""
    return (put_back(directory) / STATE).is_dir()


@dataclass(frozen=True)
class SavedRun:
    """A saved run to resume."""

    opened: OpenCheckpoint

    @property
    def extra(self) -> Any:
        """The `extra` that was saved."""
        return self.opened.extra

    def load(self, optimizer: Optimizer) -> None:
        """Restore the model and the optimizer to what was saved.

        Raises:
            CheckpointError: the state belongs to another model or optimizer, or cannot be read.
        """
        with advised():
            self.opened.load(optimizer)


@dataclass(frozen=True)
class RunDirectory:
    """Saves and opens checkpoints of `model` and `tokenizer`; a `models.recipe.trainable.Checkpoints`."""

    model: CompiledModule
    tokenizer: PreTrainedTokenizerBase

    def save(self, directory: Path, optimizer: Optimizer, extra: dict[str, Any], *,
             background: bool = False) -> Saving:  # fmt: skip
        """Replace `directory` by a model that `from_pretrained` loads and the state of the run, atomically.

        With `background`, the run's state, which is most of it, is written in the background if the host has room for a
        copy.

        Raises:
            CheckpointError: this save failed, or the one before it did; an existing checkpoint stays intact.
        """
        saves = self.model.session.saves
        saves.finish()
        ranks = saves.ranks if background else self.model.ranks
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(directory, ranks))
            self.model.write_pretrained(temporary)
            self._save_tokenizer(temporary)
            contents = checkpoint_contents(self.model, optimizer, extra)
            if not background:
                write(temporary / STATE, contents, ranks)
                return Saving.finished()
            rest = stack.pop_all()

        def go_on(copying: Copying) -> None:
            with rest:
                write(temporary / STATE, contents, ranks, copying)

        return saves.start(go_on, self.model.session.planned_host_bytes(), may_wait=True)

    def open(self, directory: Path) -> SavedRun:
        """Return the saved run, verified but not loaded yet.

        Raises:
            CheckpointError: there is no state in `directory`, or it is damaged.
        """
        ranks = self.model.ranks
        with advised():
            with ranks.failing_alike():
                state = (put_back(directory) if ranks.rank == 0 else directory) / STATE
                if ranks.rank == 0 and not state.is_dir():
                    raise CheckpointError(f"there is nothing to resume in {directory}: no {STATE}")
            return SavedRun(open_checkpoint(self.model, state))

    def _save_tokenizer(self, directory: Path) -> None:
        """Rank 0 writes the tokenizer; if that fails, all ranks raise."""
        with self.model.ranks.failing_alike():
            try:
                if self.model.ranks.rank == 0:
                    self.tokenizer.save_pretrained(directory)
            # tokenizers raises a bare Exception when the disk is full.
            except Exception as error:
                raise OSError(f"the tokenizer: {error}") from error
