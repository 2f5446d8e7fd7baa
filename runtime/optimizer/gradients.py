"""The built-in optimizer's gradients, between the backward that computes them and the update that consumes them.

A gradient moves to where its chunk is updated, in the dtype it was computed in. The gradients of several backwards are
summed there, in the master's dtype.
"""

import math
import time
from functools import partial

import torch
from torch import Tensor

from ..isa.errors import StateError
from ..isa.homes import Where
from ..kernels.update_rules import Gradient
from ..memory.stats import Stats
from ..memory.streams import Arrival
from .landings import Landings
from .own_states import OwnStates
from .states import ChunkState
from .updates import UpdateKernels
from .worker import Tickets


class HeldGradients:
    """The gradients of all chunks.

    `measures`: whether the norm of every gradient is taken, for clipping or to find overflows.
    `loss_scale` multiplies the gradient that a backward starts from; held gradients include it, sums do not.
    """

    def __init__(self, states: OwnStates, tickets: Tickets, kernels: UpdateKernels, stats: Stats) -> None:
        self.states = states
        self.kernels = kernels
        self.tickets = tickets
        self.copies = tickets.copies
        self.stats = stats
        self.landings = Landings(states.hardware, tickets)
        self.measures = False
        self.loss_scale = 1.0
        masters = {chunk.layout.master_dtype for chunk in states.chunks.chunks}
        self._norm_dtype = torch.float64 if torch.float64 in masters else torch.float32
        self.norms = self._zeros(len(states.chunks.chunks))
        self.host_sum_s = 0.0
        self._landed: dict[int, Arrival] = {}

    def hold(self, state: ChunkState, gradients: Tensor, slots: list[int]) -> None:
        """Keeps the gradient of one backward."""
        state.call_off()
        index = state.layout.index
        state.present.update(slots)
        if self.measures:
            state.measured = set(slots)
            torch.linalg.vector_norm(gradients, dtype=self._norm_dtype, out=self.norms[index])
        if not self.states.format.lands(state.layout, state.home):
            state.held = gradients
            return
        self._landed[index] = self._to_host(self._landing(state), gradients)

    def keeps(self, state: ChunkState) -> bool:
        """Whether a single backward's gradient, in the device buffer the program made it in, is still read after the
        program is done with it: until the step, or until a streamed update has read it."""
        format = self.states.format
        return not format.lands(state.layout, state.home) and not (state.home.on_device and format.at_once)

    def add(self, state: ChunkState, gradients: Tensor, slots: list[int]) -> None:
        """Adds to the gradients of earlier backwards, in the master's dtype and without the loss scale."""
        index, factor = state.layout.index, 1.0 / self.loss_scale
        first = not state.present
        total = self.states.make_total(state) if first else self.total(state)
        state.call_off()
        state.added = True
        state.present.update(slots)
        if state.where is Where.DEVICE:
            self._accumulate(total, gradients, factor, first)
            return
        landing = self._landing(state)
        landed = self._landed[index] = self._to_host(landing, gradients)
        self.tickets.submit(index, partial(self._add_on_host, total, landing, factor, first), landed)

    def _add_on_host(self, total: Tensor, gradients: Tensor, factor: float, first: bool) -> Arrival:
        """Runs on the worker once the gradient has landed."""
        began_s = time.perf_counter()
        self._accumulate(total, gradients, factor, first)
        self.host_sum_s += time.perf_counter() - began_s
        return None

    def _accumulate(self, total: Tensor, gradients: Tensor, factor: float, first: bool) -> None:
        self.kernels.add(total, Gradient(gradients, factor), fresh=first)

    def _landing(self, state: ChunkState) -> Tensor:
        """The pinned host buffer in which the chunk's gradient is to land."""
        if self.states.format.shares_landing(state.layout, state.home):
            state.held = self.landings.take(state)
        assert state.held is not None
        return state.held

    def _to_host(self, target: Tensor, gradients: Tensor) -> Arrival:
        self.stats.moved(to_host=gradients.nbytes)
        return self.copies.to_host(target, gradients)

    def landed(self, index: int) -> Arrival:
        """The arrival of the chunk's last gradient on the host."""
        return self._landed.get(index)

    def finish(self) -> None:
        """Blocks until all gradients have landed on the host."""
        for arrival in self._landed.values():
            self.copies.finish(arrival)

    def total(self, state: ChunkState) -> Tensor:
        """The sum of the gradients so far, in the master's dtype. Later gradients are added to this tensor, and the
        caller may write to it."""
        state.call_off()
        if state.added:
            assert state.total is not None
            return state.total
        if state.total is None and state.held is not None and self._is_sum(state):
            total = state.total = state.held
            if self.loss_scale != 1.0:
                total.mul_(1.0 / self.loss_scale)
        else:
            total = self.states.make_total(state)
            total.zero_()
            if state.present and state.held is not None:
                self.copies.finish(self.landed(state.layout.index))
                self._accumulate(total, state.held, 1.0 / self.loss_scale, first=True)
        if state.clipped is not None:
            total.mul_(state.clipped.to(total.device))
            state.clipped = None
        if state.where is Where.DEVICE:
            state.held = None
        state.added = True
        return total

    @staticmethod
    def _is_sum(state: ChunkState) -> bool:
        """Whether the held gradient can serve as the sum. One on the host cannot: the next gradient lands in its
        buffer."""
        assert state.held is not None
        return state.where is Where.DEVICE and state.held.dtype == state.layout.master_dtype

    def norm(self) -> Tensor:
        """The norm of all gradients, without the loss scale: a scalar on the device, which is not waited for."""
        local_shards, zero, by_axes = (
            self.states.chunks.local_shards,
            self.states.zero,
            dict[tuple[str, ...], list[Tensor]](),
        )
        for state in self.states:
            # All ranks must reduce over the same axes in the same order, even if a chunk has no gradient here.
            norms = by_axes.setdefault(state.layout.reduced_over, [self._zeros()])
            # All slots of a chunk are sharded alike and owned by the same processes.
            if state.present and self.states.chunks.ownership.counts(state.layout.slots[0].name):
                norms.append(self._norm_of(state) / math.sqrt(local_shards.replicas(state.layout.slots[0])))
        found = [
            zero.norm(local_shards.norm(torch.linalg.vector_norm(torch.stack(norms))), axes)
            for axes, norms in by_axes.items()
        ] or [self._zeros()]
        total = found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found))
        return self.states.chunks.ownership.norm(total)

    def clip(self, max_norm: float) -> Tensor:
        """Clips the norm of all gradients to `max_norm` and returns the norm before clipping.

        Raises StateError with in_backward=True, where no gradients are left to clip.
        """
        if self.states.format.in_backward:
            raise StateError(
                "in_backward=True consumes each gradient during the backward; to clip, leave in_backward out"
            )
        norm = self.norm()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for state in self.states:
            if state.present and state.added:
                self.tickets.arrive(state.layout.index)
                total = self.total(state)
                total.mul_(factor.to(total.device))
            elif state.present:  # scaled by the update: a float32 sum would take twice the held gradient's memory
                state.clipped = factor if state.clipped is None else state.clipped * factor
        return norm

    def _norm_of(self, state: ChunkState) -> Tensor:
        """The norm of a chunk's gradient, on the device."""
        if state.present == state.measured and not state.added:
            norm = self.norms[state.layout.index]
        else:
            norm = self._norm_of_slots(state).to(self.states.hardware.device, non_blocking=True)
        if state.added:
            return norm
        norm = norm / self.loss_scale
        return norm if state.clipped is None else norm * state.clipped

    def _norm_of_slots(self, state: ChunkState) -> Tensor:
        self.tickets.arrive(state.layout.index)
        self.copies.finish(self.landed(state.layout.index))
        slices = (state.slice(state.gradient, slot) for slot in state.present)
        norms = [torch.linalg.vector_norm(gradient, dtype=self._norm_dtype) for gradient in slices]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._norm_dtype, device=self.states.hardware.device)

    def forget(self, state: ChunkState, slot: int) -> None:
        """Drops one parameter's gradient. The chunk's updates must be finished."""
        state.present.discard(slot)
        state.call_off()
        if not state.present:
            self.states.forget_gradient(state)
            return
        # Gradients that are added later must not be added to this one.
        self.copies.finish(self.landed(state.layout.index))
        state.slice(state.gradient, slot).zero_()

    def forget_all(self) -> None:
        for state in self.states:
            if state.present:
                self.tickets.arrive(state.layout.index)
                self.states.forget_gradient(state)
