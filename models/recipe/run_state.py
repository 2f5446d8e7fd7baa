"""What a run needs besides weights and optimizer state to continue as if it had never stopped."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.isa.errors import CheckpointError
from .recipe import Recipe


@dataclass(frozen=True)
class RunState:
    """The state of a run between two steps.

    Attributes:
        step: steps done; the position in the data follows from it.
        curve: the settings that the loss curve depends on, by name.
        data: the data's fingerprint.
        perplexity_before: held-out perplexity when the run began.
        mesh: the mesh of the processes, as text.
        random: the states of each process's random generators, from `random_states`, by rank.
    """

    step: int
    curve: dict[str, Any]
    data: str
    perplexity_before: float
    mesh: str
    random: list[dict[str, Any]]

    def extra(self) -> dict[str, Any]:
        """Return this state for a checkpoint, in types that load without running code."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def of(cls, extra: Any, directory: Path) -> RunState:
        """Return the state that `extra`, from the checkpoint in `directory`, was made from.

        Raises:
            CheckpointError: `extra` was not made from a RunState.
        """
        expected = {each.name for each in fields(cls)}
        if not isinstance(extra, dict) or extra.keys() != expected:
            raise CheckpointError(
                f"the checkpoint in {directory} was not written by geminifx train: expected the values "
                f"{', '.join(sorted(expected))} in it; start the run without --resume"
            )
        return cls(**extra)

    def check(self, recipe: Recipe, data: str) -> None:
        """Make sure that a run of `recipe`, on data with the fingerprint `data`, is the one that was saved.

        Raises:
            ValueError: settings or data differ from those of the saved run.
        """
        changed = [
            f"{name} was {self.curve.get(name)}, now {value}"
            for name, value in recipe.curve().items()
            if self.curve.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{recipe.output} was trained with different settings: {'; '.join(changed)}. Resume with the same ones"
            )
        if self.data != data:
            raise ValueError(
                f"{recipe.output} was trained on different data; resume with the same --data and --seq-len"
            )


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, in types that load without running code."""
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
    """Restore the generators to `states`; states of devices that this machine lacks are ignored."""
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.random.set_rng_state(states["torch"])
    for i, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, i)


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
