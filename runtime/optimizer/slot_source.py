"""What a lazy parameter reads and writes: one slot of a training state."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..distributed.zero import Zero
from ..isa.errors import StateError
from ..isa.formats import OwnFormat
from ..memory.chunks import ChunkStore
from ..memory.lazy_parameter import Gradient, LazyParameter, UsedUpGradient, become_lazy, gathered_gradient
from .gradients import HeldGradients
from .own_states import OwnStates
from .states import ChunkState
from .zeroed import ZeroedGradients


class Slots(Protocol):
    """The part of the store that its slots use."""

    @property
    def chunks(self) -> ChunkStore: ...
    @property
    def format(self) -> OwnFormat: ...
    @property
    def zero(self) -> Zero: ...
    @property
    def held(self) -> HeldGradients: ...
    @property
    def states(self) -> OwnStates: ...
    @property
    def zeroed(self) -> ZeroedGradients: ...
    def state_of(self, parameter: str) -> tuple[ChunkState, int]: ...
    def take(self, value: Tensor, parameter: str) -> Tensor: ...
    def join(self, held: Tensor, parameter: str) -> Tensor: ...
    def finish(self, index: int | None = None) -> None: ...
    def forget_gradient(self, parameter: str) -> None: ...


@dataclass(frozen=True)
class SlotSource:
    """One parameter's slot. `name`, `shape` and `dtype` are the parameter's.

    Reading a slot of a divided chunk is a collective: all processes must read, in the same order.
    """

    store: Slots
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        state, slot = self._state()
        self.store.finish(state.layout.index)
        return self.store.join(state.read(slot), self.name).cpu()

    @property
    def elsewhere(self) -> str:
        state, slot = self._state()
        return self.store.chunks.local_shards.elsewhere(state.layout.slots[slot])

    @property
    def is_writable(self) -> bool:
        return self.store.chunks.writers.are_there

    def write(self, value: Tensor) -> None:
        if not self.is_writable:
            raise self.refused("an assignment")
        if tuple(value.shape) != self.shape:
            raise ValueError(
                f"parameter {self.name} has shape {self.shape}, but the value has shape {tuple(value.shape)}"
            )
        state, slot = self._state()
        self.store.finish(state.layout.index)
        state.write(slot, self.store.take(value, self.name))
        chunk = self.store.chunks.chunks[state.layout.index]
        if chunk.resident is not None:
            own = self.store.zero.own(chunk.resident, chunk.layout)
            state.slice(own, slot).copy_(state.slice(state.weights, slot))

    def refused(self, by: str) -> StateError:
        return StateError(
            f"parameter {self.name} cannot be written by {by}: model.optimizer(...) keeps the master weights, and "
            "reading the parameter gives a copy. Set values with model.load_state_dict(...), and step the optimizer "
            "that model.optimizer(...) returned"
        )

    def gradient(self) -> Tensor | None:
        """The gradient itself or, for a divided chunk, a copy that refuses writes."""
        state, slot = self._state()
        if self.store.format.in_backward:
            had = self.store.zeroed.has(state.layout.index, slot)
            return UsedUpGradient(self.shape, self.dtype, self._used_up("read")) if had else None
        if slot not in state.present:
            return None
        self.store.finish(state.layout.index)
        held = state.slice(self.store.held.total(state), slot)
        divided = self.store.chunks.chunks[state.layout.index].layout.shards > 1
        return gathered_gradient(self.store.join(held, self.name), self.name) if divided else held.as_subclass(Gradient)

    def set_gradient(self, value: Tensor | None) -> None:
        if value is None:
            self.store.forget_gradient(self.name)
            return
        if self.store.format.in_backward:
            raise self._used_up("set")
        state, slot = self._state()
        self.store.finish(state.layout.index)
        state.slice(self.store.held.total(state), slot).copy_(self.store.take(value, self.name))
        state.present.add(slot)
        self.store.zeroed.brought(state.layout.index, [slot])

    def _state(self) -> tuple[ChunkState, int]:
        return self.store.state_of(self.name)

    def _used_up(self, done: str) -> StateError:
        return StateError(
            f"the gradient of {self.name} cannot be {done}, because in_backward=True consumes each gradient during "
            "the backward; leave in_backward out, or, for clipping, pass max_grad_norm= to model.optimizer(...)"
        )


def make_lazy(store: Slots) -> None:
    """Makes the parameters of all chunks read from their training states. The objects stay the same, and from now on
    only the model keeps them alive.

    Parameters of chunks that are not placed yet, for lack of memory, stay as they are.
    """
    for chunk, state in zip(store.chunks.chunks, store.states, strict=False):
        dtype = state.layout.master_dtype
        for slot, parameter in zip(chunk.layout.slots, chunk.parameters, strict=False):
            if not isinstance(parameter, LazyParameter) or parameter.dtype != dtype:
                become_lazy(parameter, SlotSource(store, slot.name, slot.shape, dtype))
        chunk.parameters = []
