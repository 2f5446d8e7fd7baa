"""What `geminifx train` leaves in --output: the model for other programs, and what the run goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from ...runtime.isa.errors import CheckpointError
from ...runtime.state_io.filesystem import METADATA
from ...runtime.state_io.sharded import replacing
from ..checkpoint import load_checkpoint, read_extra, write_checkpoint
from ..module import CompiledModule

STATE = "state"
"""The folder of --output with a checkpoint such as `geminifx.save_checkpoint` makes; model and tokenizer lie beside."""


@dataclass(frozen=True)
class RunDirectory:
    """Checkpoints of `model` and `tokenizer`, as `finetune` asks for them: see `models.recipe.trainable`."""

    model: CompiledModule
    tokenizer: PreTrainedTokenizerBase

    def save(self, directory: Path, optimizer: Optimizer, extra: dict[str, Any]) -> None:
        """Replace `directory` by a model that `from_pretrained` loads and the state of the run: by both or not at all.

        Raises:
            CheckpointError: it cannot be written; a checkpoint that was there is intact.
        """
        with replacing(directory, self.model.ranks) as temporary:
            self.model.save_pretrained(temporary)
            self._save_tokenizer(temporary)
            write_checkpoint(self.model, optimizer, temporary / STATE, extra)

    def extra(self, directory: Path) -> Any:
        """Return the `extra` that was saved.

        Raises:
            CheckpointError: there is no state in `directory`, or it cannot be read.
        """
        if not (directory / STATE / METADATA).is_file():
            raise CheckpointError(
                f"there is nothing to resume in {directory}: no {STATE}/{METADATA}; start the run without --resume"
            )
        with _advice():
            return read_extra(self.model, directory / STATE)

    def load(self, directory: Path, optimizer: Optimizer) -> None:
        """Put model and optimizer back to what was saved.

        Raises:
            CheckpointError: it cannot be read, or is of another model.
        """
        with _advice():
            load_checkpoint(self.model, optimizer, directory / STATE)

    def _save_tokenizer(self, directory: Path) -> None:
        """Of several processes rank 0 writes it; what fails there raises on all of them."""
        ranks, error = self.model.ranks, None
        try:
            if ranks.rank == 0:
                self.tokenizer.save_pretrained(directory)
        # tokenizers tells of a full disk by a bare Exception.
        except Exception as caught:
            error = OSError(f"the tokenizer: {caught}")
            error.__cause__ = caught
        ranks.raise_alike(error)


@contextmanager
def _advice() -> Iterator[None]:
    """Say what is left to do where a run cannot go on."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; start the run without --resume") from error
