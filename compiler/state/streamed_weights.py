"""Runs a model's own Python on streamed weights, for generation: compiled, every token would need a program.

While the context is open, each parameter is a stand-in without memory. The first operator that reads one fetches its
chunk to the device, in the compute dtype; the chunk is released when others need the room. Weights, copies and
accounting are the same as for a program.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...runtime.isa.errors import BudgetError, StateError, as_cause
from ...runtime.isa.layout import ChunkLayout, Slot
from ...runtime.isa.torch_private import wrapper_parameter
from ...runtime.machine import Machine
from ...runtime.memory.state_store import Run
from ...runtime.memory.tiers import MemoryMeter, metering
from ..session import Session

KEPT = 2
"""How many chunks are held on the device at a time, if they fit, besides those that stay there anyway."""


class _Chunks:
    """The weights of the chunks that were read last, on the device."""

    def __init__(self, machine: Machine, meter: MemoryMeter | None) -> None:
        self.machine, self.meter = machine, meter
        self.weights: OrderedDict[int, Tensor] = OrderedDict()

    def read(self, layout: ChunkLayout) -> Tensor:
        """All weights of a chunk, on the device; fetched if necessary."""
        index = layout.index
        if index not in self.weights:
            while len(self.weights) >= KEPT:
                self._release(next(iter(self.weights)))
            try:
                self.weights[index] = self._fetch(layout)
            except (BudgetError, torch.cuda.OutOfMemoryError):
                self.release_all()
                self.weights[index] = self._fetch(layout)
        self.weights.move_to_end(index)
        return self.weights[index]

    def _fetch(self, layout: ChunkLayout) -> Tensor:
        chunk = self.machine.chunks[layout.index]
        try:
            fetched = self.machine.fetch(layout.index, layout.numel, layout.dtype)
            if self.meter is not None:  # the meter by itself sees only results of operators
                self.meter.watch(fetched, is_booked=self.machine.store.stays(chunk))
            return self.machine.wait(fetched, layout.index)
        except BaseException:
            chunk.rest()
            raise

    def _release(self, index: int) -> None:
        self.machine.release(self.weights.pop(index), index)

    def release_all(self) -> None:
        for index in list(self.weights):
            self._release(index)


class StreamedWeight(nn.Parameter):
    """A stand-in for a parameter: any operator on it runs on the weights themselves, which are fetched for it."""

    chunks: _Chunks
    chunk: ChunkLayout
    place: Slot

    def __new__(cls, chunks: _Chunks, chunk: ChunkLayout, place: Slot) -> "StreamedWeight":
        strides = torch.empty(place.shape, device="meta").stride()
        weight = wrapper_parameter(cls, place.shape, strides, chunk.dtype, False, chunks.machine.device)
        weight.chunks, weight.chunk, weight.place = chunks, chunk, place
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"StreamedWeight {self.place.name}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(StreamedWeight, cls._values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _values(self) -> Tensor:
        return self.place.of(self.chunks.read(self.chunk))


@contextmanager
def streamed_weights(session: Session) -> Iterator[None]:
    """Within, the source's forward computes as in an evaluation, in the compute dtype, without being captured. Memory
    for anything besides weights is not planned for, but the budget still holds.

    Raises BudgetError, within, if the budget is too small, and StateError if parameters are divided over processes.
    """
    session.ready(backward=False)
    setup = session.demanded()
    layout = setup.plan.layout
    if setup.plan.mesh.tensor_axes or layout.owned or any(chunk.shards > 1 for chunk in layout.chunks):
        raise StateError(
            "generate() runs the original model, whose parameters are divided over processes here; save the model "
            "with save_pretrained(), load it elsewhere and generate there"
        )
    chunks = _Chunks(setup.machine, session.meter)
    weights = {name: StreamedWeight(chunks, chunk, chunk.slots[slot]) for name, (chunk, slot) in layout.places.items()}
    names = {id(parameter): name for name, parameter in session.source.named_parameters()}
    autocast = torch.autocast(setup.machine.device.type, enabled=False)  # as around a program
    try:
        setup.machine.run = Run()
        stand_ins = _standing_in(session.source, lambda parameter: weights[names[id(parameter)]])
        with stand_ins, torch.no_grad(), autocast, metering(session.meter):
            yield
        chunks.release_all()
        setup.machine.store.rest()
    except BaseException as error:
        chunks.weights.clear()
        setup.machine.abort()
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise BudgetError(
                f"the device budget ran out while the model generated: {error}. Generate fewer sequences or tokens at "
                "a time, or raise device_budget"
            ) from as_cause(error)
        raise


@contextmanager
def _standing_in(source: nn.Module, weight_of: Callable[[nn.Parameter], StreamedWeight]) -> Iterator[None]:
    """While this is open, modules have stand-ins for their parameters; afterwards none, wherever it is interrupted."""
    held = [(m._parameters, name, p) for m in source.modules() for name, p in m._parameters.items() if p is not None]

    def restore() -> None:
        for parameters, name, parameter in held:
            parameters[name] = parameter

    try:
        try:
            for parameters, name, parameter in held:
                parameters[name] = weight_of(parameter)
            yield
        finally:
            restore()
    finally:
        restore()  # again, as an interrupt may have come before or within the first
