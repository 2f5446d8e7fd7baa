"""What fine-tuning asks of a model, of the processes that train it, and of their checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ...runtime.isa.mesh import Mesh


class Processes(Protocol):
    """The processes that train one model together, of which this is number `rank`."""

    @property
    def rank(self) -> int: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def data_rank(self) -> int:
        """Which part of every batch is this process's."""
        ...

    def failing_alike(self) -> AbstractContextManager[None]:
        """Where what all of them do within fails on one, all raise."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return what every one of them has for `value`, by rank; all call it."""
        ...

    def check_alike(self, what: str, digest: str) -> None:
        """Raise where their digests differ; all call it."""
        ...


class Trainable(Protocol):
    """A compiled model, as far as the loop goes."""

    @property
    def ranks(self) -> Processes: ...
    def __call__(self, **batch: torch.Tensor) -> Any: ...
    def parameters(self) -> Iterable[torch.nn.Parameter]: ...
    def optimizer(self, kind: type, params: Any, *, max_grad_norm: float, **hyper: Any) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def first_nonfinite(self, **batch: torch.Tensor) -> str | None: ...


class SavedRun(Protocol):
    """A checkpoint that was opened. All processes call every method."""

    @property
    def extra(self) -> Any:
        """The `extra` that was saved."""
        ...

    def load(self, optimizer: Any) -> None:
        """Put the model and its optimizer back to what was saved.

        Raises:
            CheckpointError: the checkpoint cannot be read, or is of another model.
        """
        ...


class Saving(Protocol):
    """A checkpoint that may still be being written."""

    def done(self) -> bool:
        """Return whether it is written, or failed."""
        ...

    def result(self) -> None:
        """Block until it is written.

        Raises:
            CheckpointError: it could not be; a checkpoint that was there is intact.
        """
        ...


class Checkpoints(Protocol):
    """Checkpoints of a model and of what goes with it. All processes call every method."""

    def save(self, directory: Path, optimizer: Any, extra: dict[str, Any], *, background: bool = False) -> Saving:
        """Replace `directory` by a checkpoint of the model, its optimizer and rank 0's `extra`: all of it or nothing.
        In the background the run may go on when this returns.

        Raises:
            CheckpointError: it cannot be written; a checkpoint that was there is intact.
        """
        ...

    def open(self, directory: Path) -> SavedRun:
        """Return the checkpoint in `directory`, of which nothing is loaded yet.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        ...
