"""What a run needs beside its weights to go on as if it had never stopped, saved as one unit with them."""

from __future__ import annotations

import pickle
import random
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.errors import CheckpointError, GeminiError
from ...runtime.state_io.atomic_directory import shared_directory

STATE_FILE = "training_state.pt"


class Saveable(Protocol):
    """A model that writes itself in the Hugging Face format, by all of its processes together."""

    @property
    def ranks(self) -> Ranks: ...

    def save_pretrained(self, save_directory: str | Path) -> Any: ...


@dataclass(frozen=True)
class TrainingState:
    """A moment between two steps.

    Attributes:
        step: steps done; the data's position follows from it.
        optimizer: the optimizer's state_dict.
        random: the states of the random generators, from `random_states`; of several processes those of rank 0.
        curve: the settings that the loss curve depends on, by name.
        data: the data's fingerprint.
        perplexity_before: held-out perplexity when the run began.
        random_of_others: as `random`, of ranks 1, 2, ...
    """

    step: int
    optimizer: dict[str, Any]
    random: dict[str, Any]
    curve: dict[str, Any]
    data: str
    perplexity_before: float
    random_of_others: list[dict[str, Any]] = field(default_factory=list)


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, in types that load without code."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (
            str(kind),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the generators back to `states`; those of devices this machine lacks are left out."""
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.random.set_rng_state(states["torch"])
    for i, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, i)


def save_training_state(directory: str | Path, state: TrainingState) -> None:
    """Write `state` beside a checkpoint in `directory`."""
    # A file of our own: of one that torch opens it does not tell why a write failed.
    with (Path(directory) / STATE_FILE).open("wb") as file:
        torch.save({each.name: getattr(state, each.name) for each in fields(state)}, file)


def load_training_state(directory: str | Path) -> TrainingState:
    """Return the state saved in `directory`, its tensors on the CPU.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    file = Path(directory) / STATE_FILE
    if not file.is_file():
        raise CheckpointError(
            f"there is nothing to resume in {directory}: no {STATE_FILE}; start the run without --resume"
        )
    try:
        return TrainingState(**torch.load(file, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; start the run without --resume") from error


def save_checkpoint(
    directory: str | Path, model: Saveable, tokenizer: PreTrainedTokenizerBase | None, state: TrainingState
) -> None:
    """Replace `directory` by a checkpoint of model, tokenizer and `state`: all of it, or nothing changes.

    Of several processes all call it, and what rank 0 gives is saved.

    Raises:
        CheckpointError: the disk is full or not writable; the checkpoint saved before is intact.
    """
    try:
        with shared_directory(directory, model.ranks) as temporary:
            model.save_pretrained(temporary)
            if tokenizer is not None and model.ranks.rank == 0:
                tokenizer.save_pretrained(temporary)
            if model.ranks.rank == 0:
                save_training_state(temporary, state)
    except GeminiError:
        raise
    # torch and safetensors report a failed write as errors of their own, which are not OSErrors.
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"could not save step {state.step} to {directory}: {reason}. A checkpoint saved there before is "
            "intact; free some space (or choose another --output) and go on from it with --resume"
        ) from error
