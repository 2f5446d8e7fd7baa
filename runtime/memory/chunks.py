"""Chunks: where parameters live between uses, and the states they pass through.

The states follow Gemini (Colossal-AI) and PatrickStar (Fang et al., 2021). A chunk's state is the state of all its
tensors:

    FREE                   its weights are not on the device
    HOLD                   its weights are on the device, or on their way, but not in use
    COMPUTE                a program reads its weights
    HOLD_AFTER_BACKWARD    the backward has read its weights for the last time
    READY_FOR_REDUCE       its gradients are complete and on their way to the master
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from enum import Enum

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from ..distributed.local_shards import ALONE, LocalShards
from ..distributed.ownership import Ownership
from ..isa.errors import StateError
from ..isa.layout import ChunkLayout, Layout, Slot
from ..isa.precision import master_dtype
from ..isa.torch_private import num_references
from ..isa.transitions import transition
from . import local_norms
from .elsewhere import Elsewhere, Writers
from .lazy_parameter import become_lazy


class State(Enum):
    FREE = "FREE"
    HOLD = "HOLD"
    COMPUTE = "COMPUTE"
    HOLD_AFTER_BACKWARD = "HOLD_AFTER_BACKWARD"
    READY_FOR_REDUCE = "READY_FOR_REDUCE"


LEGAL: dict[State, frozenset[State]] = {
    State.FREE: frozenset({State.HOLD, State.COMPUTE}),
    State.HOLD: frozenset({State.FREE, State.COMPUTE}),
    State.COMPUTE: frozenset({State.HOLD, State.HOLD_AFTER_BACKWARD}),
    State.HOLD_AFTER_BACKWARD: frozenset({State.COMPUTE, State.READY_FOR_REDUCE}),
    State.READY_FOR_REDUCE: frozenset({State.HOLD}),
}


class Chunk:
    """One chunk's storage.

    `master` is what the optimizer updates, on the host or the device; `gradient` lies beside it, in the same dtype.
    `cast` is a host copy in the compute dtype, from which weights are copied to the device if the dtypes differ.
    `resident` is a device copy of the weights that is kept between their uses; for a divided chunk it is gathered from
    all shards, and holds the weights of version `gathered` of the training state (-1: none).
    """

    def __init__(self, layout: ChunkLayout) -> None:
        self.layout = layout
        self.state = State.FREE
        self.master: Tensor | None = None
        self.gradient: Tensor | None = None
        self.cast: Tensor | None = None
        self.resident: Tensor | None = None
        self.gathered = -1
        self.parameters: list[nn.Parameter] = []
        self._own_references = 0

    def prepare_gradient(self) -> None:
        """Allocates `gradient` beside the master, anew if the user kept gradients of an earlier step after
        zero_grad(): those must not be overwritten."""
        assert self.master is not None
        if self.gradient is not None:
            kept = num_references(self.gradient) > self._own_references
            if not kept or any(parameter.grad is not None for parameter in self.parameters):
                return
        self.gradient = torch.zeros_like(self.master)
        self._own_references = num_references(self.gradient)

    @property
    def gradient_version(self) -> int:
        """How often `gradient` has been written in place; -1 without one."""
        return -1 if self.gradient is None else self.gradient._version

    @property
    def has_gradients(self) -> bool:
        """Whether some parameter's `.grad` is a view of `gradient`."""
        return self.gradient is not None and any(map(self._owns_grad, range(len(self.parameters))))

    def move(self, state: State) -> None:
        """Changes the state. Raises IllegalTransition if the program's instructions for it are out of order."""
        names = ", ".join(slot.name for slot in self.layout.slots[:3])
        hint = ". The program's instructions for this chunk are out of order"
        self.state = transition(LEGAL, f"chunk {self.layout.index} ({names}, ...)", self.state, state, hint)

    def rest(self) -> None:
        """Returns to FREE from wherever an interrupted step left the chunk; the master is untouched."""
        self.state = State.FREE

    def slice(self, flat: Tensor, slot: int) -> Tensor:
        return self.layout.slots[slot].of(flat)

    def accumulate(self, source: Tensor, slots: list[int]) -> None:
        """Adds the complete gradients in `source` (flat, of any float dtype, on the master's device) to `.grad`."""
        assert self.gradient is not None
        fresh = [i for i in slots if self.parameters[i].grad is None]
        whole = len(slots) == len(self.parameters)
        # One kernel for the whole chunk if all its gradients are new, or all are here already; else one per parameter.
        if whole and len(fresh) == len(slots):
            self.gradient.copy_(source)
        elif whole and not fresh and all(self._owns_grad(i) for i in slots):
            self.gradient.add_(source)
        else:
            for i in slots:
                self._accumulate_slot(source, i)
        for i in slots:
            if not self._owns_grad(i):
                self.parameters[i].grad = self.slice(self.gradient, i)

    def _accumulate_slot(self, source: Tensor, slot: int) -> None:
        assert self.gradient is not None
        target, existing = self.slice(self.gradient, slot), self.parameters[slot].grad
        if existing is not None and not self._owns_grad(slot):
            target.copy_(existing)  # keep a gradient that the user assigned
            existing = target
        target.copy_(self.slice(source, slot)) if existing is None else target.add_(self.slice(source, slot))

    def _owns_grad(self, slot: int) -> bool:
        grad = self.parameters[slot].grad
        """Whether the parameter's `.grad` is its slot of `gradient`."""
        assert self.gradient is not None
        offset = self.layout.slots[slot].offset * self.gradient.itemsize
        return grad is not None and grad.data_ptr() == self.gradient.data_ptr() + offset


def with_own_storage(view: Tensor) -> Tensor:
    """The same memory as a tensor with a storage of its own, no larger than itself. Saving a plain view would save the
    whole chunk, and code that looks for shared memory would take all parameters of a chunk for one."""
    if view.is_meta or not view.numel():
        return view
    with torch.cuda.device(view.device) if view.is_cuda else nullcontext():  # DLPack refuses tensors of another device
        return from_dlpack(view)


class ChunkStore:
    """All chunks of a model, and the model's parameters as views of their masters.

    Parameter objects keep their identity, so that an optimizer made before or after compilation holds the same ones.
    Placing a chunk moves its parameters into it and frees their old storages at once; a parameter that is sharded then
    is this process's local shard. Once parameters are read from training states, the chunks drop them: the parameters
    refer to the store of the states, which must not refer back.
    """

    def __init__(self, layout: Layout, parameters: dict[str, nn.Parameter], local_shards: LocalShards = ALONE) -> None:
        self.layout = layout
        self.local_shards = local_shards
        self.chunks = [Chunk(chunk) for chunk in layout.chunks]
        for chunk in self.chunks:
            chunk.parameters = [parameters[slot.name] for slot in chunk.layout.slots]
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        """The parameters' names, by `id(parameter)`."""
        self.ownership = Ownership(local_shards.ranks, layout.owners)
        self.writers = Writers()
        self.has_let_go = False
        self._lacking = {name: parameters[name] for name in self.ownership.elsewhere}
        self.elsewhere = {name: self._elsewhere(name, parameter) for name, parameter in self._lacking.items()}
        """The parameters that only other processes hold, by name: their shapes and dtypes, and who holds them."""
        if self.elsewhere or local_shards.ranks.mesh.weight_axes:
            local_norms.refuse_them(self)

    def sharded(self) -> Iterator[tuple[nn.Parameter, str]]:
        """The parameters here that are local shards of larger ones, and what to tell the user of each."""
        for chunk in self.chunks:
            for slot, parameter in zip(chunk.layout.slots, chunk.parameters, strict=False):
                if told := self.local_shards.elsewhere(slot):
                    yield parameter, told

    def _elsewhere(self, name: str, parameter: nn.Parameter) -> Elsewhere:
        dtype, ranks = master_dtype(parameter), self.ownership.ranks_of(name)
        return Elsewhere(name, tuple(parameter.shape), dtype, f"rank(s) {ranks}", self.writers)

    def lay_out(self, layout: Layout, parameters: Mapping[str, nn.Parameter]) -> None:
        """Takes a layout that differs from the present one at most in that more chunks are trained; the next `place`
        makes room for what that takes."""
        for chunk, new in zip(self.chunks, layout.chunks, strict=True):
            assert [slot.name for slot in chunk.layout.slots] == [slot.name for slot in new.slots]
            if chunk.layout != new:
                chunk.layout = new
                chunk.parameters = [parameters[slot.name] for slot in new.slots]
        self.layout = layout

    def let_go(self) -> None:
        """Frees the memory of the parameters that only other processes hold. Without those processes, as on meta, it
        does nothing."""
        if not self.local_shards.ranks.launched:
            return
        self.has_let_go = True
        for name, parameter in self._lacking.items():
            parameter.grad = None
            become_lazy(parameter, self.elsewhere[name])
        self._lacking = {}

    def place_of(self, parameter: str) -> tuple[ChunkLayout, int]:
        """The chunk of a parameter and its slot there. Raises StateError if only other processes hold it."""
        if parameter in self.elsewhere:
            raise self.elsewhere[parameter].lacking()
        return self.layout.places[parameter]

    def dtype_of(self, parameter: str) -> torch.dtype:
        """The dtype of a parameter's master, whichever process holds it."""
        lies = self.elsewhere.get(parameter)
        return self.layout.places[parameter][0].master_dtype if lies is None else lies.dtype

    def whole(self, parameter: str, part: Tensor, device: torch.device) -> Tensor:
        """The whole of a parameter, or of a tensor laid out like it, from all processes' parts.

        All processes call it, for one parameter after the other, and exchange by way of `device`. `part` is this
        process's; if only others hold the parameter, just its shape and dtype are used. The result is on the CPU if
        anything had to be gathered.
        """
        if parameter not in self.elsewhere:
            layout, slot = self.layout.places[parameter]
            part = self.local_shards.join(part, layout.slots[slot], device)
        return self.ownership.share(parameter, part, device)

    def whole_shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of the whole parameter, of which this process may hold a part or nothing."""
        if parameter in self.elsewhere:
            return self.elsewhere[parameter].shape
        layout, slot = self.layout.places[parameter]
        return self.local_shards.whole_shape(layout.slots[slot])

    def place(self, chunk: Chunk, master: Tensor) -> None:
        """Makes `master` the chunk's master: values move into it, and parameters become views of it. Those on `meta`
        get their place and wait for values."""
        for slot, parameter in enumerate(chunk.parameters):
            view = chunk.slice(master, slot)
            if parameter.is_meta:
                torch.utils.swap_tensors(parameter, nn.Parameter(with_own_storage(view), parameter.requires_grad))
                continue
            view.copy_(self.local_shard(chunk.layout.slots[slot], parameter.detach()))
            grad, parameter.grad = parameter.grad, None
            parameter.data = with_own_storage(view)
            if grad is not None:
                parameter.grad = self.local_shard(chunk.layout.slots[slot], grad).to(view.device, view.dtype)
        chunk.master = master

    def local_shard(self, slot: Slot, value: Tensor) -> Tensor:
        """This process's shard of a parameter's value, which may already be that shard."""
        return value if tuple(value.shape) == slot.shape else self.local_shards.take(value, slot)

    def adopt(self) -> None:
        """Copies into the masters what was assigned to parameters' `.data` since the last step.

        Raises StateError if the new data has another shape.
        """
        for chunk in self.chunks:
            assert chunk.master is not None
            base = chunk.master.data_ptr()
            for slot, parameter in zip(chunk.layout.slots, chunk.parameters, strict=True):
                if parameter.data_ptr() == base + slot.offset * chunk.master.itemsize or slot.numel == 0:
                    continue
                if tuple(parameter.shape) != slot.shape:
                    raise StateError(
                        f"parameter {slot.name} was assigned data of shape {tuple(parameter.shape)}, expected "
                        f"{slot.shape}; compile the changed model again"
                    )
                view = chunk.slice(chunk.master, chunk.layout.slots.index(slot))
                view.copy_(parameter.detach())
                parameter.data = with_own_storage(view)

    def versions(self) -> dict[str, int]:
        """How often each parameter was written in place, by name."""
        return {
            slot.name: parameter._version
            for chunk in self.chunks
            for slot, parameter in zip(chunk.layout.slots, chunk.parameters, strict=True)
        }
