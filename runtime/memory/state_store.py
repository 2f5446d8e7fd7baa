"""What the machine asks of whoever keeps the training state: one protocol, two stores.

`TorchStore` keeps masters that any of torch's optimizers updates, `OwnStore` (in `optimizer`) the states of our own,
which are updated beside the program. The machine moves chunks through their states and runs programs; a store decides
which bytes move.
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
    "a backward(), or what else changes gradients, ended half way, so that they are of a part of it; call zero_grad(), "
    "and begin the step anew with the first of its batches"
)


@dataclass
class Run:
    """One run of a program under way: the chunks its backward reduces, and those it has copied from their masters.

    `counts`: whether its backward is one of the step's, which brings parameters' gradients. `absent` are the parameters
    that get none from it, by chunk and slot: no output that they reach was used. `updates` are those before it.
    """

    reduces: frozenset[int] = frozenset()
    backward: bool = False
    counts: bool = False
    absent: frozenset[tuple[int, int]] = frozenset()
    refreshed: set[int] = field(default_factory=set)
    updates: int = 0

    def reached(self, chunk: int, slots: list[int]) -> list[int]:
        """Those of a chunk's slots that get a gradient."""
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
        """How long the host's updates beside programs took so far."""

    @property
    def is_between_steps(self) -> bool:
        """Whether no gradient is there that the next step will use, as far as is known of them."""

    @property
    def loss_scale(self) -> float:
        """What a backward that began now would multiply its gradients by."""

    # -- where it lies -------------------------------------------------------------------------------------

    def place(self, homes: Homes) -> None:
        """Put every chunk's state where it belongs; values stay. Raises BudgetError on a full tier."""

    def leave(self) -> None:
        """Give all memory back to the tiers: another store takes over. The parameters keep their values."""

    # -- instructions --------------------------------------------------------------------------------------

    def fetch(self, chunk: Chunk, run: Run) -> Tensor:
        """Start to bring a chunk's weights to the device, in the compute dtype."""

    def arrive(self, chunk: Chunk, weights: Tensor) -> None:
        """From here on the weights are read."""

    def release(self, chunk: Chunk) -> None:
        """Nobody reads them any more."""

    def stays(self, chunk: Chunk) -> bool:
        """Whether the weights are on the device between their uses, too."""

    def gradients(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer for a chunk's gradients."""

    def reduce(self, chunk: Chunk, gradients: Tensor, slots: list[int]) -> None:
        """A chunk's gradients are complete: start to move them to where its master is."""

    def accumulate_grad(self, chunk: Chunk, gradients: Tensor, slots: list[int]) -> None:
        """The gradients are used up by the program: it frees them behind this."""

    # -- steps ---------------------------------------------------------------------------------------------

    def begin_backward(self) -> float:
        """Called before the instructions of a backward; returns what to multiply its gradients by."""

    def end_backward(self) -> None:
        """All of a backward is done. Where one ends without this, its gradients are of a part of it."""

    def rest(self) -> None:
        """A program sleeps or ends here: from now on anybody may write to what parameters are on the host."""

    def finish(self) -> None:
        """Block until updates under way are done and all state is at rest."""

    def abort(self, run: Run) -> str:
        """Forget a run that failed half way. Returns what to tell the user of the state that is left."""

    def stale(self) -> str:
        """A backward was refused, for parameters have changed since its forward. Returns what to tell the user."""

    # -- parameters ----------------------------------------------------------------------------------------

    def versions(self) -> dict[str, int]:
        """How often each parameter was written, by name."""

    def adopt(self) -> None:
        """Take over what was written to parameters since the last step. Raises StateError where it does not fit."""

    def writable(self) -> AbstractContextManager[None]:
        """While this is open, parameters may be copied to."""

    def zero_grad(self, set_to_none: bool) -> None:
        """Drop all gradients, or set them to zero."""

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip the norm of all gradients, over all processes; returns it as it was before."""

    def stored_master(self, parameter: str) -> Stored:
        """A parameter's master as a checkpoint reads and writes it."""

    def masters_written(self) -> None:
        """Let programs compute with masters that were written by way of `stored_master`."""
