"""Parameters of pipeline stages on other ranks: in the module with their name and shape, but without memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..isa.errors import StateError
from .stored import Stored


class Writers:
    """Counts the open contexts in which parameters may be written to."""

    def __init__(self) -> None:
        self._count = 0

    @property
    def are_there(self) -> bool:
        return self._count > 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


@dataclass(frozen=True)
class Elsewhere:
    """The source of such a parameter; `where` names the ranks that hold its values, for messages."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    writers: Writers

    @property
    def elsewhere(self) -> str:
        return f"{self.name} belongs to layers that other ranks run: {self.where}"

    def read(self) -> Tensor:
        raise self.lacking()

    def lacking(self) -> StateError:
        """The error for any read of the parameter."""
        return StateError(
            f"parameter {self.name} cannot be read here, because it belongs to layers that other ranks run: "
            f"{self.where}. Read it there, or call model.state_dict() on all ranks, which gathers every parameter"
        )

    @property
    def is_writable(self) -> bool:
        return self.writers.are_there

    def write(self, value: Tensor) -> None:
        """Checks the shape alone: the parameter's owners take the value."""
        if tuple(value.shape) != self.shape:
            raise ValueError(
                f"parameter {self.name} has shape {self.shape}, but the value has shape {tuple(value.shape)}"
            )

    def refused(self, by: str) -> StateError:
        return StateError(
            f"parameter {self.name} cannot be written here by {by}, because it belongs to layers that other ranks "
            f"run: {self.where}. Set values with model.load_state_dict(...) on all ranks"
        )

    def gradient(self) -> Tensor | None:
        """None, so that optimizers skip it: its owners have the gradient."""
        return None

    def set_gradient(self, value: Tensor | None) -> None:
        if value is not None:
            raise self.refused("its .grad")

    @property
    def stored(self) -> Stored:
        """As a checkpoint sees it: this process reads and writes none of it."""
        return Stored.of(torch.empty(0, dtype=self.dtype), self.shape, ())
