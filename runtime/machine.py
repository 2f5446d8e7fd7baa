"""The machine: implements the instruction set over chunks and a store of their training state.

Generated programs call it as `geminifx`; its methods have the instructions' names and arguments. The machine moves
chunks through their states, and the store decides which bytes move.
"""

import torch
from torch import Tensor

from .distributed.point_to_point import Messages
from .distributed.ranks import ALONE, Ranks
from .isa.errors import GeminiError
from .isa.instructions import microbatch, summed_shape
from .isa.layout import verified_view
from .kernels.random_state import fork, generator_of
from .memory.chunks import Chunk, State
from .memory.offloads import Offloads
from .memory.state_store import Run, StateStore


class Machine:
    """Runs the instructions of one model's programs on one device ("cpu": the budgeted arena in RAM).

    `run` is the run whose program is executing. Others may be under way, each asleep at a turn of its program.
    """

    def __init__(self, store: StateStore, ranks: Ranks = ALONE) -> None:
        self.store = store
        self.ranks = ranks
        self.collectives = collectives = ranks.collectives
        self.start_all_gather = collectives.start_all_gather
        self.start_reduce_scatter = collectives.start_reduce_scatter
        self.start_all_reduce = collectives.start_all_reduce
        self.finish_collective = collectives.finish_collective
        self.local, self.offset = collectives.local, collectives.offset
        self.messages = Messages(ranks)
        self.send, self.finish_send = self.messages.send, self.messages.finish_send
        self.finish_receive = self.messages.finish_receive
        self.offloads = offloads = Offloads(store.hardware, store.copies, store.stats)
        self.offload, self.depart = offloads.offload, offloads.depart
        self.reload, self.arrive = offloads.reload, offloads.arrive
        self.chunks = store.chunks.chunks
        self.device = store.hardware.device
        self.run = Run()
        self._versions: list[dict[str, int]] = []  # of the last training step's parameters; empty before the first
        self._updates = 0
        self._apart: list[tuple[Tensor, Tensor]] = []  # open swaps: what was swapped in, the state before

    # -- weights -------------------------------------------------------------------------------------------

    def fetch(self, index: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Starts to bring a chunk's weights to the device, in the compute dtype."""
        chunk = self.chunks[index]
        if chunk.state is State.FREE:
            chunk.move(State.HOLD)
        return self.store.fetch(chunk, self.run)

    def wait(self, fetched: Tensor, index: int) -> Tensor:
        """Completes a `fetch`: the program reads the chunk's weights from here on."""
        self.store.arrive(self.chunks[index], fetched)
        self.chunks[index].move(State.COMPUTE)
        return fetched

    view = staticmethod(verified_view)

    def release(self, weights: Tensor, index: int) -> None:
        """The program no longer reads the weights; a copy that does not stay is freed with its last reference."""
        chunk = self.chunks[index]
        self.store.release(chunk)
        if self.run.backward and index in self.run.reduces:
            chunk.move(State.HOLD_AFTER_BACKWARD)
        else:
            self._hold(chunk)

    def _hold(self, chunk: Chunk) -> None:
        chunk.move(State.HOLD)
        if not self.store.stays(chunk):
            chunk.move(State.FREE)

    # -- gradients -----------------------------------------------------------------------------------------

    def gradients(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer for a chunk's gradients, in the compute dtype."""
        return self.store.gradients(numel, dtype)

    @staticmethod
    def put(gradients: Tensor, offset: int, gradient: Tensor) -> None:
        verified_view(gradients, offset, gradient.shape).copy_(gradient)

    @staticmethod
    def put_mm(gradients: Tensor, offset: int, left: Tensor, right: Tensor) -> None:
        """Writes left @ right as one parameter's gradient into a flat chunk of gradients."""
        torch.mm(left, right, out=verified_view(gradients, offset, (left.shape[0], right.shape[1])))

    @staticmethod
    def put_sum(gradients: Tensor, offset: int, terms: Tensor, dims: list[int]) -> None:
        """Writes the sum of `terms` over `dims` as one parameter's gradient into a flat chunk of gradients."""
        torch.sum(terms, dims, out=verified_view(gradients, offset, summed_shape(terms.shape, dims)))

    def reduce(self, gradients: Tensor, index: int, slots: list[int]) -> None:
        """A chunk's gradients are complete: starts to move those of `slots` to the chunk's master."""
        chunk = self.chunks[index]
        if chunk.state in (State.FREE, State.HOLD):  # the backward never reads its weights, as for an embedding
            chunk.move(State.COMPUTE)
            chunk.move(State.HOLD_AFTER_BACKWARD)
        chunk.move(State.READY_FOR_REDUCE)
        reached = self.run.reached(index, slots)
        for slot in set(slots).difference(reached):  # zero tangents times infinity are NaN: keep it out of norms, sums
            place = chunk.layout.slots[slot]
            gradients.narrow(0, place.offset, place.numel).zero_()
        if reached:
            self.store.reduce(chunk, gradients, reached)

    def accumulate_grad(self, gradients: Tensor, index: int, slots: list[int]) -> None:
        """Completes a `reduce`: the store no longer needs the program's buffer, which may be freed."""
        if reached := self.run.reached(index, slots):
            self.store.accumulate_grad(self.chunks[index], gradients, reached)
        self._hold(self.chunks[index])

    # -- batches -------------------------------------------------------------------------------------------

    microbatch = staticmethod(microbatch)

    # -- ranks ---------------------------------------------------------------------------------------------

    def average(self, value: Tensor) -> Tensor:
        """The mean of a value over the ranks."""
        return self.ranks.average_(value.clone())

    def broadcast(self, value: Tensor) -> Tensor:
        """The value that the first of the ranks has which hold the same layers."""
        return self.ranks.broadcast_(value.clone())

    def start_receive(self, shape: list[int], stride: list[int], dtype: torch.dtype, source: int) -> Tensor:
        """A buffer for the next tensor from rank `source` of the pipeline; it may be read after `finish_receive`."""
        return self.messages.start_receive(shape, stride, dtype, source, self.device)

    @staticmethod
    def share(loss: Tensor, count: Tensor, average: Tensor) -> Tensor:
        """Scales a mean over `count` tokens to this rank's term of the mean over all ranks' tokens, where `average` is
        the mean of `count` over the ranks; 0 where `count` is 0, but NaN, as a mean of nothing, where `average` is."""
        share = (count / average).to(loss.dtype)
        return torch.where(share == 0, torch.zeros_like(loss), loss * share)

    # -- random numbers ------------------------------------------------------------------------------------

    @staticmethod
    def drawn(state: Tensor, value: Tensor) -> None:
        """Does nothing: marks that `value` was drawn only to advance the generator from `state`."""

    @property
    def random_state(self) -> Tensor:
        """The state of the generator that random operators draw from."""
        return generator_of(self.device).get_state()

    @random_state.setter
    def random_state(self, state: Tensor) -> None:
        generator_of(self.device).set_state(state)

    def save_rng(self, like: Tensor) -> Tensor:
        return self.random_state

    def swap_rng(self, state: Tensor) -> None:
        """Swaps the generator's state with `state`."""
        current, comes_back = self.random_state, bool(self._apart) and self._apart[-1][0] is state
        if not comes_back:
            self._apart.append((state, current))
        self.random_state = state
        state.copy_(current)
        if comes_back:
            self._apart.pop()

    def fork_rng(self, like: Tensor, axes: list[str]) -> Tensor:
        """A generator state that differs between the places on these axes of the mesh."""
        return fork(self.device, tuple(self.ranks.mesh.coordinate(self.ranks.rank, axis) for axis in axes))

    # -- runs ------------------------------------------------------------------------------------------

    def updates(self, versions: dict[str, int]) -> int:
        """How many parameter updates came before a training step that finds parameters at these versions. Counts
        changes between steps, not writes, which may differ in number between ranks that hold the same values."""
        self._updates += self._versions not in ([], [versions])
        self._versions = [versions]
        return self._updates

    def check_at_rest(self, program: str) -> None:
        """Raises GeminiError if a program is about to sleep while it reads a chunk, which other runs may use next."""
        reading = next((chunk for chunk in self.chunks if chunk.state is State.COMPUTE), None)
        if reading is not None:
            raise GeminiError(
                f"'{program}' reached a turn while it still reads chunk {reading.layout.index}; a program must "
                "release all chunks before a turn and fetch them again after it"
            )

    def leave(self) -> None:
        """Returns all memory to the tiers: another machine takes over."""
        self.store.leave()
        self.offloads.drop()

    def abort(self) -> str:
        """Forgets a run that failed half way. Returns what to tell the user about the state that remains."""
        self.collectives.abandon()
        self.messages.abandon()
        left = self.store.abort(self.run)
        self.store.copies.join()  # copies under way still write to memory that dies with the program
        for chunk in self.chunks:
            chunk.rest()
        if self._apart:  # otherwise ranks would draw differently from here on
            self.random_state = self._apart[0][1]
            self._apart.clear()
        self.run = Run()
        return left
