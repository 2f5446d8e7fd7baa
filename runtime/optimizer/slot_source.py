"""What a lazy parameter reads and writes: one slot of a training state."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..isa.errors import StateError
from ..memory.lazy_parameter import LazyParameter, gathered_gradient, refuse_gradient
from .states import ChunkState
from .updating_machine import UpdatingMachine


@dataclass(frozen=True)
class SlotSource:
    """One parameter's slot. `name`, `shape` and `dtype` are the parameter's.

    Where its chunk is divided, what is read is gathered: all processes read, in one order, or none does.
    """

    machine: UpdatingMachine
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        state, slot = self._state()
        self.machine.finish(state.layout.index)
        return self.machine.join(state.read(slot), self.name).cpu()

    def write(self, value: Tensor) -> None:
        if not self.machine.writable:
            raise StateError(
                f"parameter {self.name} was to be written: model.optimizer(...) keeps the masters. Set values with "
                "model.load_state_dict(...)"
            )
        if tuple(value.shape) != self.shape:
            raise ValueError(f"parameter {self.name} has shape {self.shape}, the value {tuple(value.shape)}")
        state, slot = self._state()
        self.machine.finish(state.layout.index)
        state.write(slot, self.machine.take(value, self.name))
        chunk = self.machine.chunks[state.layout.index]
        if chunk.resident is not None:
            own = self.machine.zero.own(chunk.resident, chunk.layout)
            state.slice(own, slot).copy_(state.slice(state.weights, slot))

    def gradient(self) -> Tensor | None:
        """The gradient itself, or, where its chunk is divided, a copy that refuses to be written to."""
        self._refuse_in_backward("read")
        state, slot = self._state()
        if slot not in state.present:
            return None
        self.machine.finish(state.layout.index)
        held = state.slice(self.machine.held.total(state), slot)
        divided = self.machine.chunks[state.layout.index].layout.shards > 1
        return gathered_gradient(self.machine.join(held, self.name), self.name) if divided else held

    def set_gradient(self, value: Tensor | None) -> None:
        if value is None:
            self.machine.forget_gradient(self.name)
            return
        self._refuse_in_backward("set")
        state, slot = self._state()
        self.machine.finish(state.layout.index)
        state.slice(self.machine.held.total(state), slot).copy_(self.machine.take(value, self.name))
        state.present.add(slot)

    def _state(self) -> tuple[ChunkState, int]:
        return self.machine.state_of(self.name)

    def _refuse_in_backward(self, done: str) -> None:
        if self.machine.updates.in_backward:
            raise StateError(
                f"the gradient of {self.name} was to be {done}, but in_backward=True uses each gradient up in the "
                "backward itself; leave in_backward out, and for clipping pass max_grad_norm= to model.optimizer(...)"
            )


def make_lazy(machine: UpdatingMachine) -> None:
    """Let the parameters of all chunks be read from their training states; the objects stay the same.

    Where some chunks found no room, theirs stay as they are.
    """
    for chunk, _ in zip(machine.chunks, machine.placing.states, strict=False):
        for slot, parameter in zip(chunk.layout.slots, chunk.parameters, strict=True):
            if not isinstance(parameter, LazyParameter):
                source = SlotSource(machine, slot.name, slot.shape, chunk.layout.master_dtype)
                _make_lazy(parameter, source)


def _make_lazy(parameter: nn.Parameter, source: SlotSource) -> None:
    trained = parameter.requires_grad
    torch.utils.swap_tensors(parameter, LazyParameter(source, True))
    parameter.register_hook(refuse_gradient)
    parameter.requires_grad_(trained)


@contextmanager
def writable(machine: UpdatingMachine) -> Iterator[None]:
    """While this is open, parameters may be copied to."""
    machine.writable = True
    try:
        yield
    finally:
        machine.writable = False
