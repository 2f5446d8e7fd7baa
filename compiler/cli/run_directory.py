"""What `geminifx train` leaves in --output: the model for other programs, and what the run goes on from."""

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
"""The folder of --output with a checkpoint such as `geminifx.save_checkpoint` makes; model and tokenizer lie beside."""


@contextmanager
def advised() -> Iterator[None]:
    """Say what is left to do where a run cannot go on."""
    try:
        yield
    except (CheckpointError, ModelLoadError) as error:
        raise CheckpointError(f"{error}; start the run without --resume") from error


def holds_run(directory: Path) -> bool:
    """Return whether there is a run in `directory` to go on with, whole or damaged."""
    return (put_back(directory) / STATE).is_dir()


@dataclass(frozen=True)
class SavedRun:
    """A run to go on from."""

    opened: OpenCheckpoint

    @property
    def extra(self) -> Any:
        """The `extra` that was saved."""
        return self.opened.extra

    def load(self, optimizer: Optimizer) -> None:
        """Put model and optimizer back to what was saved.

        Raises:
            CheckpointError: it is of another model or optimizer, or cannot be read.
        """
        with advised():
            self.opened.load(optimizer)


@dataclass(frozen=True)
class RunDirectory:
    """Checkpoints of `model` and `tokenizer`, as `finetune` asks for them: see `models.recipe.trainable`."""

    model: CompiledModule
    tokenizer: PreTrainedTokenizerBase

    def save(self, directory: Path, optimizer: Optimizer, extra: dict[str, Any], *,
             background: bool = False) -> Saving:  # fmt: skip
        """Replace `directory` by a model that `from_pretrained` loads and the state of the run: by both or not at all.

        In the background the state is written, which is most of it, where the host has room for a copy.

        Raises:
            CheckpointError: it cannot be written, or the one before could not; a checkpoint that was there is intact.
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
        """Return what was saved, read through, and not loaded yet.

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
        """Of several processes rank 0 writes it; what fails there raises on all of them."""
        with self.model.ranks.failing_alike():
            try:
                if self.model.ranks.rank == 0:
                    self.tokenizer.save_pretrained(directory)
            # tokenizers tells of a full disk by a bare Exception.
            except Exception as error:
                raise OSError(f"the tokenizer: {error}") from error
