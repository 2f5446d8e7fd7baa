"""Updates, on the device, training states that lie on the host: copied up, updated and copied back piece by piece."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..isa.formats import SHORTEST_GRADIENT, STREAM_BUFFERS, STREAM_PIECE
from ..isa.moments import BLOCK, stored_numel
from ..kernels.update_rules import Gradient
from ..memory.hardware import Hardware
from ..memory.streams import Arrival
from .states import ChunkState, Range, StateSlice
from .updates import UpdateKernels


@dataclass
class _Buffer:
    part: StateSlice
    gradient: Tensor | None
    free: Arrival = None


class StateStream:
    """Streams states through a few device buffers, concurrently with the program's own copies and compute.

    All states of one stream are of one kind; `like` is the longest. Gradients are on the device already, or are
    streamed with the state if `with_gradients`.
    """

    def __init__(self, hardware: Hardware, like: ChunkState, *, with_gradients: bool) -> None:
        self.copies = hardware.new_copies()
        self.numel = like.layout.piece_numel(STREAM_PIECE)
        self._device = hardware.device
        self._buffers = [self._new_buffer(like, with_gradients) for _ in range(STREAM_BUFFERS)]
        for buffer in self._buffers:
            buffer.free = self.copies.mark()
        self._turn = 0
        self._settled: dict[int, Arrival] = {}

    def _new_buffer(self, like: ChunkState, with_gradient: bool) -> _Buffer:
        def new(tensor: Tensor, numel: int = self.numel) -> Tensor:
            return torch.empty(stored_numel(tensor.dtype, numel), dtype=tensor.dtype, device=self._device)

        rest = None if like.rest is None else new(like.rest)
        part = StateSlice(new(like.weights), rest, tuple(map(new, like.travelling_moments)))
        if not with_gradient:
            return _Buffer(part, None)
        gradient = like.weights if like.total is None else like.total
        return _Buffer(part, new(gradient, max(self.numel, SHORTEST_GRADIENT)))

    def update(self, state: ChunkState, ranges: list[Range], job: "StreamedUpdate") -> Arrival:
        """Starts to update `ranges`. Returns the arrival after which the weights are updated and the gradient read."""
        launched = done = self.copies.mark()
        before = (self._settled.get(state.layout.index), *job.after)
        for elements in ranges:
            for piece in elements.pieces(self._piece(job.gradient)):
                buffer = self._buffers[self._turn % STREAM_BUFFERS]
                self._turn += 1
                done = self._update_piece(state, piece, job, buffer, launched, before)
                # Copies to the host end in order, so the last one stands for all.
                self._settled[state.layout.index] = buffer.free
        return done if job.weights_stay else self._settled.get(state.layout.index)

    def _piece(self, gradient: Gradient) -> int:
        """Elements per piece: fewer if a sum of gradients needs more room than the buffer was made for."""
        room = self._buffers[0].gradient
        fitting = self.numel if room is None else _as(room, gradient.values.dtype).numel()
        return self.numel if fitting >= self.numel else fitting // BLOCK * BLOCK

    def finish(self, index: int) -> None:
        """Blocks until the chunk's state on the host is whole."""
        self.copies.finish(self._settled.get(index))

    def _update_piece(self, state: ChunkState, piece: Range, job: "StreamedUpdate", buffer: _Buffer,
                      launched: Arrival, before: tuple[Arrival, ...]) -> Arrival:  # fmt: skip
        """Copies a piece up once the buffer is free and the host's state is whole, updates it behind the work launched
        so far, and copies it back."""
        home, numel = state.part(piece), piece.end - piece.start
        local, values = buffer.part.room_for(home), job.gradient.values[piece.start : piece.end]
        # Factored moments stay on the device; they come last, so that zip drops them.
        travelling = list(zip(local.tensors, home.tensors, strict=False))[job.weights_stay :]
        coming = travelling
        if buffer.gradient is not None:
            landing = _as(buffer.gradient, values.dtype)[:numel]
            coming, values = [*travelling, (landing, values)], landing
        arrival = self.copies.all_to_device(coming, buffer.free, *before)
        with self.copies.aside(arrival, launched):
            part = replace(local, weights=home.weights) if job.weights_stay else local
            part = part if state.travelling_moments else replace(part, moments=home.moments)
            job.kernels.update(state.layout, part, Gradient(values, job.gradient.scale), piece)
            done = self.copies.mark()
        buffer.free = self.copies.all_to_host([(there, here) for here, there in travelling], done)
        return done


@dataclass(frozen=True)
class StreamedUpdate:
    """The inputs of an update besides the state: the whole chunk's gradient, on either side, and what to wait for
    before it is read. `weights_stay`: the weights are on the device and are not copied."""

    gradient: Gradient
    kernels: UpdateKernels
    weights_stay: bool
    after: tuple[Arrival, ...] = ()


def _as(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of `flat` as elements of another dtype, as many as fit."""
    fitting = flat.nbytes // dtype.itemsize * dtype.itemsize
    return flat.view(torch.uint8)[:fitting].view(dtype)
