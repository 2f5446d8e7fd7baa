"""Pinned host buffers that gradients land in which are consumed on the host: a few, shared by all such chunks."""

import torch
from torch import Tensor

from ..isa.formats import OwnFormat
from ..memory.hardware import Hardware
from .states import ChunkState
from .worker import Tickets


class Landings:
    """The shared landings, and the chunks whose gradients occupy them, by chunk index.

    A gradient occupies a landing until the worker's job that reads it is done. That job must be submitted before the
    next `take`.
    """

    def __init__(self, hardware: Hardware, tickets: Tickets) -> None:
        self.hardware = hardware
        self.tickets = tickets
        self._kinds: dict[torch.dtype, tuple[int, int]] | None = {}  # number and length by dtype; None: half made
        self._free: dict[torch.dtype, list[Tensor]] = {}
        self._taken: dict[int, Tensor] = {}

    def make(self, format: OwnFormat, states: list[ChunkState]) -> None:
        """Allocates the landings for the states as they are placed now; none may be in use. Raises BudgetError on a
        full host."""
        placed = [(state.layout, state.home) for state in states]
        kinds = format.landings(placed)
        if kinds == self._kinds:
            return
        self._kinds, self._free, self._taken = None, {}, {}
        self.hardware.host_tier.book("gradients on their way to the host", format.staging_bytes(placed))
        for dtype, (count, numel) in kinds.items():
            self._free[dtype] = [self.hardware.zeros(numel, dtype, False, pinned=True) for _ in range(count)]
        self._kinds = kinds

    def take(self, state: ChunkState) -> Tensor:
        """A landing for the chunk's gradient. If all are occupied, blocks until one is free."""
        index, dtype = state.layout.index, state.layout.dtype
        if index in self._taken:  # by its previous gradient, which is read before the chunk's next work begins
            return self._taken[index][: state.layout.numel]
        if not self._free[dtype]:
            self._free[dtype].append(self._taken.pop(self._first_free(dtype)))
        self._taken[index] = self._free[dtype].pop()
        return self._taken[index][: state.layout.numel]

    def _first_free(self, dtype: torch.dtype) -> int:
        """The chunk whose landing is free first: the worker prefers the lowest index."""
        taken = [index for index, place in self._taken.items() if place.dtype == dtype]
        done = next((index for index in taken if self.tickets.is_launched(index)), None)
        if done is None:
            done = min(taken)
            self.tickets.launched(done)
        return done
