"""Starts the updates of training states, wherever each lies, and lets them run beside the program.

Each chunk's update under way has a ticket, and whatever needs the chunk next waits for that ticket alone: the device
waits on an event, and the launching thread only for the host worker, until that has issued its copy.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..isa.formats import STREAM_PIECE, STREAMED_GRADIENTS, Kind, kind_of, longest_of_each_kind
from ..isa.homes import Homes, Where
from ..isa.layout import ChunkLayout
from ..kernels.update_rules import Gradient
from ..memory.stats import Stats
from ..memory.streams import Arrival
from .gradients import HeldGradients
from .own_states import OwnStates
from .state_stream import StateStream, StreamedUpdate
from .states import ChunkState, Early, Range, Schedule
from .updates import UpdateKernels
from .worker import Tickets


@dataclass(frozen=True)
class Factor:
    """What gradients are multiplied by, for updates on either side; kept until no update can still read it."""

    on_device: float | Tensor
    on_host: float | Tensor
    arrival: Arrival


UNSCALED = Factor(1.0, 1.0, None)

WHOLE_UPDATES = "updates of whole parameters"

ON_THEIR_WAY = "states on their way through the device"


class Bets:
    """Decides whether to begin updates before `step()` asks for them. After a step that asked for different updates the
    pause doubles, so that a loop that always clips, or always writes to gradients, loses next to nothing."""

    most = 64

    def __init__(self) -> None:
        self._bet = self._missed = False
        self._pause, self._next = 0, 1

    def miss(self) -> None:
        """Records that a step asked for a different update than the one begun early."""
        self._missed = True

    def are_on(self) -> bool:
        """Whether to bet in this step; called once per step."""
        if self._missed:
            self._missed, self._pause = False, self._next
            self._next = min(2 * self._next, self.most)
        elif self._bet:
            self._next = 1
        self._bet = self._pause == 0
        self._pause = max(0, self._pause - 1)
        return self._bet


class Updater:
    """Updates the states; `schedule` gives the hyper-parameters of each parameter's next update."""

    def __init__(self, states: OwnStates, tickets: Tickets, held: HeldGradients, kernels: UpdateKernels,
                 stats: Stats) -> None:  # fmt: skip
        self.states = states
        self.tickets = tickets
        self.copies = tickets.copies
        self.held = held
        self.stats = stats
        self.kernels = kernels
        self.schedule: Schedule = lambda asked: [None for _ in asked]
        self.streams: dict[Kind, StateStream] = {}
        self.released: dict[int, Arrival] = {}
        self.host_update_s = 0.0
        self._streamed: list[tuple[Arrival, Tensor]] = []
        self._factors: dict[tuple[bool, int], Factor] = {}
        self._longest: list[ChunkLayout] | None = []  # longest streamed chunk of each kind; None: half made
        self.bets = Bets()
        self._begun: set[int] = set()

    def drop_streams(self, homes: Homes) -> None:
        """Frees the stream buffers, unless those for `homes` have the same sizes; called before states move there."""
        placed = [(state.layout, home) for state, home in zip(self.states, homes, strict=False)]
        if longest_of_each_kind(placed) != self._longest:
            self.streams, self._longest = {}, []
            self.states.hardware.device_tier.book(ON_THEIR_WAY, 0)

    def make_streams(self) -> None:
        """Allocates buffers for the states that are streamed from where they lie now. Raises BudgetError on a full
        tier."""
        states, format, hardware = self.states, self.states.format, self.states.hardware
        placed = [(state.layout, state.home) for state in states]
        hardware.device_tier.book(WHOLE_UPDATES, format.working_bytes(state.layout for state in states))
        longest = longest_of_each_kind(placed)
        if longest == self._longest:
            return
        self.streams, self._longest = {}, None
        hardware.device_tier.book(ON_THEIR_WAY, format.stream_bytes(placed))
        for layout in longest:
            stream = StateStream(hardware, states[layout.index], with_gradients=not format.at_once)
            self.streams[kind_of(layout)] = stream
        self._longest = longest

    # -- starting ------------------------------------------------------------------------------------------

    def update_all(self, scale: float | Tensor) -> None:
        """Starts to update every chunk that has a gradient, in the order in which the next forward needs them."""
        waiting = [state for state in self.states if state.present]
        if not waiting:
            return  # in_backward: what the host still updates runs beside the next forward
        for state in self.states:  # the updates of the step before are done with its factors
            if state.early is None:
                self.tickets.arrive(state.layout.index)
        self._factors = {}
        for state in waiting:
            # Chunks with the same scale share a factor, which is copied to the host once.
            key = state.added, id(state.clipped)
            if key not in self._factors:
                self._factors[key] = self._factor(self._scale_of(state, scale))
            self.update(state, self._factors[key])

    def _scale_of(self, state: ChunkState, scale: float | Tensor) -> float | Tensor:
        """What a chunk's gradient is multiplied by; sums are already unscaled and clipped."""
        if not state.added and self.held.loss_scale != 1.0:
            scale = scale / self.held.loss_scale
        return scale if state.clipped is None else scale * state.clipped

    def _factor(self, scale: float | Tensor) -> Factor:
        """Makes a factor for both sides; one that the device computes is copied to the host asynchronously."""
        if not isinstance(scale, Tensor) or scale.device.type == "cpu":
            return Factor(scale, scale, None)
        on_host = torch.empty((), dtype=scale.dtype, pin_memory=True)
        return Factor(scale, on_host, self.copies.to_host(on_host, scale))

    def update(self, state: ChunkState, factor: Factor = UNSCALED) -> None:
        """Starts to update one chunk with its gradient, which is consumed."""
        index, ranges = state.layout.index, state.ranges(self.schedule)
        is_early = state.early is not None and state.early.ranges == ranges
        if is_early:
            state.early = None  # the step wants the early update
        elif index in self._begun:
            self.bets.miss()
        self._begun.discard(index)
        gradient = Gradient(state.gradient, factor.on_host if state.where is Where.HOST else factor.on_device)
        state.version += 1  # gathered copies, and backwards of earlier forwards, are now stale
        if state.where is Where.DEVICE:
            for elements in ranges:
                self._update_range(state, elements, gradient)
        elif state.where is Where.HOST:
            resident = self.states.chunks.chunks[index].resident
            self.stats.moved(to_device=0 if resident is None else state.weights.nbytes)
            # The gradient must have landed, and nothing may still read the weights that are overwritten.
            after = (self.held.landed(index), self.released.get(index), factor.arrival)
            self.tickets.submit(index, partial(self._update_on_host, index, ranges, gradient, is_early), *after)
        else:
            self._update_on_the_way(state, ranges, gradient)
        self.states.forget_gradient(state)

    def begin(self, state: ChunkState) -> None:
        """Computes, into the chunk's spare, the update that `step()` will ask for unless the gradient is changed or
        clipped or the learning rate set before then; the state itself is untouched until the step."""
        index, slots = state.layout.index, state.layout.slots
        # Slots that are not updated would have to be copied to the spare.
        whole = len(state.present) == len(slots) and None not in self.schedule([(slot.name, 1) for slot in slots])
        if state.spare is None or not whole:
            return
        state.early = early = Early(state.ranges(self.schedule, counts=False))
        self._begun.add(index)
        after = self.held.landed(index), self.released.get(index)
        self.tickets.submit(index, partial(self._write_spare, index, early, Gradient(state.gradient)), *after)

    def forget_begun(self) -> None:
        """Forgets the early updates: their gradients are dropped, and what `step()` asks for later is no miss."""
        self._begun.clear()

    def _write_spare(self, index: int, early: Early, gradient: Gradient) -> Arrival:
        """Runs on the worker once the gradient has landed and nothing reads the spare's tensors as the state any
        more."""
        state = self.states[index]
        if early.is_wanted:
            assert state.spare is not None
            began_s = time.perf_counter()
            with torch.no_grad():
                for elements in early.ranges:
                    cut = slice(elements.start, elements.end)
                    scaled = Gradient(gradient.values[cut], gradient.scale)
                    self.kernels.update(state.layout, state.part(elements), scaled, elements, state.spare.cut(cut))
            self.host_update_s += time.perf_counter() - began_s
        return None

    def _update_range(self, state: ChunkState, elements: Range, gradient: Gradient) -> None:
        # A sum that found no room on the device is copied there in pieces.
        pieces = [elements] if gradient.values.device == state.weights.device else elements.pieces(STREAM_PIECE)
        for piece in pieces:
            part, values = state.part(piece), gradient.values[piece.start : piece.end]
            values = values.to(state.weights.device)
            self.kernels.update(state.layout, part, Gradient(values, gradient.scale), piece)

    def _update_on_host(self, index: int, ranges: list[Range], gradient: Gradient, is_early: bool) -> Arrival:
        """Runs on the worker once the gradient has landed and nothing reads the old weights any more. `is_early`: the
        spare has the update with the unscaled gradient, which is valid only if the factor turns out to be 1."""
        state, chunk = self.states[index], self.states.chunks.chunks[index]
        began_s = time.perf_counter()
        with torch.no_grad():
            if is_early and float(gradient.scale) == 1.0:
                state.exchange()
            else:
                if is_early:
                    self.bets.miss()
                for elements in ranges:
                    self._update_range(state, elements, gradient)
            self.host_update_s += time.perf_counter() - began_s
            if chunk.resident is None:
                return None
            own = self.states.zero.own(chunk.resident, chunk.layout)
            return self.copies.to_device(own, state.weights, None)

    def _update_on_the_way(self, state: ChunkState, ranges: list[Range], gradient: Gradient) -> None:
        index, at_once = state.layout.index, self.states.format.at_once
        if state.added:  # the worker may still be adding to the sum
            self.tickets.take(index)
        after = () if at_once else (self.held.landed(index),)
        job = StreamedUpdate(gradient, self.kernels, state.home.weights_on_device, after)
        done = self.streams[kind_of(state.layout)].update(state, ranges, job)
        self.tickets.put(index, done)
        if at_once:  # the gradient is the program's own buffer; `accumulate_grad` bounds how many wait
            self._streamed.append((done, gradient.values))
            state.held = None
        _, travels = self.states.format.travelling_bytes(state.layout, state.home)
        self.stats.moved(to_device=travels + (0 if at_once else gradient.values.nbytes), to_host=travels)

    # -- waiting -------------------------------------------------------------------------------------------

    def free_gradients(self) -> None:
        """Makes the device wait until at most `STREAMED_GRADIENTS` gradients still wait for streamed states."""
        while len(self._streamed) > STREAMED_GRADIENTS:
            self.copies.arrive(self._streamed.pop(0)[0])

    def finish(self, index: int) -> None:
        """Blocks until the chunk's update is done and its state is whole."""
        self.tickets.finish(index)  # a streamed update's ticket may cover the weights alone, the rest being on its way
        for stream in self.streams.values():
            stream.finish(index)
