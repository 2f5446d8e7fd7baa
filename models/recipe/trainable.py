"""What fine-tuning requires of a model, of the processes that train it, and of their checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ...runtime.isa.mesh import Mesh


class Processes(Protocol):
    """The processes that train one model together; this one has number `rank`."""

    @property
    def rank(self) -> int: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def data_rank(self) -> int:
        """Which part of every batch belongs to this process."""
        ...

    def failing_alike(self) -> AbstractContextManager[None]:
        """If the block fails on one process, all of them raise; all call it."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, by rank; all call it."""
        ...

    def check_alike(self, what: str, digest: str) -> None:
        """Raise if the processes' digests differ; all call it. `what` names the subject in the error."""
        ...


class Trainable(Protocol):
    """The part of a compiled model that the training loop uses."""

    @property
    def ranks(self) -> Processes: ...
    def __call__(self, **batch: torch.Tensor) -> Any: ...
    def parameters(self) -> Iterable[torch.nn.Parameter]: ...
    def optimizer(self, kind: type, params: Any, *, max_grad_norm: float, **hyper: Any) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def first_nonfinite(self, **batch: torch.Tensor) -> str | None: ...


class SavedRun(Protocol):
    """An opened checkpoint. All processes call every method."""

    @property
    def extra(self) -> Any:
        """The `extra` that was saved."""
        ...

    def load(self, optimizer: Any) -> None:
        """Restore the model and its optimizer to what was saved.

        Raises:
            CheckpointError: the checkpoint cannot be read, or is of another model.
        """
        ...


class Saving(Protocol):
    """A checkpoint that may still be being written."""

    def done(self) -> bool:
        """Return whether writing has ended, in success or failure."""
        ...

    def result(self) -> None:
        """Block until the checkpoint is written.

        Raises:
            CheckpointError: it could not be written; an existing checkpoint stays intact.
        """
        ...


class Checkpoints(Protocol):
    """Saves and opens checkpoints of a model and its run. All processes call every method."""

    def save(self, directory: Path, optimizer: Any, extra: dict[str, Any], *, background: bool = False) -> Saving:
        """Atomically replace `directory` by a checkpoint of the model, its optimizer and rank 0's `extra`. With
        `background`, this returns before all is written, and the run may continue.

        Raises:
            CheckpointError: it cannot be written; an existing checkpoint stays intact.
        """
        ...

    def open(self, directory: Path) -> SavedRun:
        """Return the checkpoint in `directory`, without loading anything yet.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        ...
