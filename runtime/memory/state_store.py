"""The interface between the machine and the store of the training state: one protocol, two implementations.

`TorchStore` keeps masters that any torch optimizer updates; `OwnStore` (in `optimizer`) keeps the states of the
built-in optimizer, which are updated beside the program. The machine moves chunks through their states and runs
programs; the store decides which bytes are copied.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..isa.formats import StateFormat
from ..isa.homes import Homes
from .chunks import Chunk, ChunkStore
from .hardware import Hardware
from .stats import Stats
from .stored import Stored
from .streams import CopyEngine

PARTIAL = (
    "a backward(), or something else that changes gradients, stopped halfway, so the gradients are incomplete; call "
    "zero_grad(), and repeat the step from its first batch"
)


@dataclass
class Run:
    """One run of a program.

    Fields:
        reduces: the indices of the chunks whose gradients its backward reduces.
        backward: whether it is in its backward.
        counts: whether its backward is one of the step's, which yields parameters' gradients.
        absent: the parameters that get no gradient from it, by chunk and slot: no output that they reach was used.
        refreshed: the indices of the chunks whose weights it has copied from their masters.
        updates: how many updates the parameters had before it.
    """

    reduces: frozenset[int] = frozenset()
    backward: bool = False
    counts: bool = False
    absent: frozenset[tuple[int, int]] = frozenset()
    refreshed: set[int] = field(default_factory=set)
    updates: int = 0

    def reached(self, chunk: int, slots: list[int]) -> list[int]:
        """The slots, of these of a chunk, that get a gradient."""
        return [slot for slot in slots if (chunk, slot) not in self.absent] if self.absent else slots


class StateStore(Protocol):
    """The training state of a model's chunks. `copies` is the engine of the program's own copies."""

    @property
    def chunks(self) -> ChunkStore: ...

    @property
    def format(self) -> StateFormat: ...

    @property
    def hardware(self) -> Hardware: ...

    @property
    def copies(self) -> CopyEngine: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def host_update_s(self) -> float:
        """Seconds spent so far on updates on the host that run beside programs."""

    @property
    def is_between_steps(self) -> bool:
        """Whether no gradients are pending for the next step, as far as the store knows."""

    @property
    def loss_scale(self) -> float:
        """What a backward that began now would multiply its gradients by."""

    # -- placement -----------------------------------------------------------------------------------------

    def place(self, homes: Homes) -> None:
        """Moves every chunk's state to its home; values stay. Raises BudgetError on a full tier."""

    def leave(self) -> None:
        """Returns all memory to the tiers, for another store to take over. The parameters keep their values."""

    # -- instructions --------------------------------------------------------------------------------------

    def fetch(self, chunk: Chunk, run: Run) -> Tensor:
        """Starts to bring a chunk's weights to the device, in the compute dtype."""

    def arrive(self, chunk: Chunk, weights: Tensor) -> None:
        """Called before the first instruction that reads the weights: work launched from now on sees them."""

    def release(self, chunk: Chunk) -> None:
        """Called after the last instruction that reads the weights."""

    def stays(self, chunk: Chunk) -> bool:
        """Whether the weights stay on the device between their uses."""

    def gradients(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer for a chunk's gradients."""

    def reduce(self, chunk: Chunk, gradients: Tensor, slots: list[int]) -> None:
        """Called when a chunk's gradients are complete: starts to move them to where its master is."""

    def accumulate_grad(self, chunk: Chunk, gradients: Tensor, slots: list[int]) -> None:
        """Takes over the gradients after `reduce`: the program frees them after this call."""

    # -- steps ---------------------------------------------------------------------------------------------

    def begin_backward(self) -> float:
        """Called before the instructions of a backward; returns the factor on its gradients (the loss scale)."""

    def end_backward(self) -> None:
        """Called after the last instruction of a backward. Without this call its gradients count as incomplete."""

    def rest(self) -> None:
        """Called where a program sleeps or ends: parameters on the host may be written to from now on."""

    def finish(self) -> None:
        """Blocks until updates under way are done and all state is at rest."""

    def abort(self, run: Run) -> str:
        """Forgets a run that failed half way. Returns what to tell the user about the state it leaves."""

    def stale(self) -> str:
        """Called when a backward is refused because parameters have changed since its forward. Returns what to tell the
        user."""

    # -- parameters ----------------------------------------------------------------------------------------

    def versions(self) -> dict[str, int]:
        """How often each parameter was written, by name."""

    def adopt(self) -> None:
        """Takes over what was written to parameters since the last step. Raises StateError if it does not fit."""

    def writable(self) -> AbstractContextManager[None]:
        """A context in which parameters may be written to."""

    def zero_grad(self, set_to_none: bool) -> None:
        """Drops all gradients, or sets them to zero."""

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clips the norm of all gradients, over all processes, and returns the norm before clipping."""

    def stored_master(self, parameter: str) -> Stored:
        """A parameter's master as a checkpoint reads and writes it."""

    def masters_written(self) -> None:
        """Called after masters were written through `stored_master`: lets programs compute with the new values."""
