"""Copies between the tiers, and pinned host memory that they run at full speed from.

On CUDA copies run on streams of their own, ordered against the compute stream by events; the launching thread waits
for one only in `finish`. Elsewhere a copy is done when its call returns.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .traffic import Direction, Traffic

Arrival: TypeAlias = torch.cuda.Event | None
"""The event that signals the end of a copy; None if it is done already."""


Pairs: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Pairs of target and source."""


class CopyEngine(Protocol):
    """Copies between the tiers, without changing dtypes, and runs work concurrently with the program.

    A copy or work starts once all of `after` has arrived; without `after`, once everything launched so far is done.
    `traffic` records when copies run.
    """

    traffic: Traffic

    def mark(self) -> Arrival:
        """The arrival that signals the end of everything launched so far."""

    def to_device(self, target: Tensor, source: Tensor, *after: Arrival) -> Arrival:
        """Starts a copy from the host, which may overwrite `target` once `after` has arrived."""

    def to_host(self, target: Tensor, source: Tensor, *after: Arrival) -> Arrival:
        """Starts a copy to the host of what `source` holds once `after` has arrived."""

    def all_to_device(self, pairs: Pairs, *after: Arrival) -> Arrival:
        """Like `to_device` for several pairs of target and source; the arrival is that of all."""

    def all_to_host(self, pairs: Pairs, *after: Arrival) -> Arrival:
        """Like `to_host` for several pairs of target and source; the arrival is that of all."""

    def aside(self, *after: Arrival) -> AbstractContextManager[None]:
        """A context whose launches run concurrently with the program, after `after`; `mark` inside refers to them."""

    def collective(self, *after: Arrival) -> AbstractContextManager[None]:
        """A context whose collectives run concurrently with the program and the copies, after `after`."""

    def arrive(self, arrival: Arrival) -> None:
        """Makes everything launched from now on wait for the arrival."""

    def join(self) -> None:
        """Makes everything launched from now on wait for all copies and all work aside."""

    def finish(self, arrival: Arrival) -> None:
        """Blocks the calling thread until the copy is done."""


class ImmediateCopies:
    """The copy engine of a machine without an accelerator: copies at once."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    def mark(self) -> Arrival:
        return None

    def to_device(self, target: Tensor, source: Tensor, *after: Arrival) -> Arrival:
        return self._copy(Direction.UP, ((target, source),))

    def to_host(self, target: Tensor, source: Tensor, *after: Arrival) -> Arrival:
        return self._copy(Direction.DOWN, ((target, source),))

    def all_to_device(self, pairs: Pairs, *after: Arrival) -> Arrival:
        return self._copy(Direction.UP, pairs)

    def all_to_host(self, pairs: Pairs, *after: Arrival) -> Arrival:
        return self._copy(Direction.DOWN, pairs)

    def _copy(self, direction: Direction, pairs: Pairs) -> Arrival:
        with self.traffic.copying(direction, on_cuda=False):
            for target, source in pairs:
                target.copy_(source)
        return None

    def aside(self, *after: Arrival) -> AbstractContextManager[None]:
        return nullcontext()

    collective = aside

    def arrive(self, arrival: Arrival) -> None:
        return None

    def join(self) -> None:
        return None

    def finish(self, arrival: Arrival) -> None:
        return None


class CudaCopies:
    """Copies on one stream per direction, so that both directions of the bus are busy at once. A third stream runs work
    aside, and collectives start from a fourth."""

    def __init__(self, device: torch.device) -> None:
        self.traffic = Traffic()
        self.up = torch.cuda.Stream(device)
        self.down = torch.cuda.Stream(device)
        self.side = torch.cuda.Stream(device)
        self.between = torch.cuda.Stream(device)

    def mark(self) -> Arrival:
        arrival = torch.cuda.Event()
        arrival.record()
        return arrival

    def to_device(self, target: Tensor, source: Tensor, *after: Arrival) -> Arrival:
        return self._copy(Direction.UP, ((target, source),), after)

    def to_host(self, target: Tensor, source: Tensor, *after: Arrival) -> Arrival:
        return self._copy(Direction.DOWN, ((target, source),), after)

    def all_to_device(self, pairs: Pairs, *after: Arrival) -> Arrival:
        return self._copy(Direction.UP, pairs, after)

    def all_to_host(self, pairs: Pairs, *after: Arrival) -> Arrival:
        return self._copy(Direction.DOWN, pairs, after)

    def _copy(self, direction: Direction, pairs: Pairs, after: tuple[Arrival, ...]) -> Arrival:
        stream = self.up if direction is Direction.UP else self.down
        self._wait(stream, after or (self.mark(),))
        with torch.cuda.stream(stream):
            with self.traffic.copying(direction, on_cuda=True):
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
            return self.mark()

    def aside(self, *after: Arrival) -> AbstractContextManager[None]:
        return self._on(self.side, after)

    def collective(self, *after: Arrival) -> AbstractContextManager[None]:
        return self._on(self.between, after)

    @contextmanager
    def _on(self, stream: torch.cuda.Stream, after: tuple[Arrival, ...]) -> Iterator[None]:
        self._wait(stream, after or (self.mark(),))
        with torch.cuda.stream(stream):
            yield

    @staticmethod
    def _wait(stream: torch.cuda.Stream, arrivals: tuple[Arrival, ...]) -> None:
        for arrival in arrivals:
            if arrival is not None:
                stream.wait_event(arrival)

    def arrive(self, arrival: Arrival) -> None:
        if arrival is not None:
            torch.cuda.current_stream().wait_event(arrival)

    def join(self) -> None:
        for stream in (self.up, self.down, self.side, self.between):
            torch.cuda.current_stream().wait_stream(stream)

    def finish(self, arrival: Arrival) -> None:
        if arrival is not None:
            arrival.synchronize()


def copy_engine(device: torch.device) -> CopyEngine:
    """The copy engine for a device, with streams of its own."""
    return CudaCopies(device) if device.type == "cuda" else ImmediateCopies()


def host_buffer(numel: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    """Zeroed host memory of exactly this size, page-locked for CUDA if `pinned`.

    torch's pinned memory rounds sizes up to powers of two and pins page by page. Touching the pages first, in parallel,
    and registering them afterwards is exact and several times faster. Raises MemoryError if CUDA cannot pin it.
    """
    buffer = torch.empty(numel, dtype=dtype).zero_()
    if pinned and numel:
        runtime, address = torch.cuda.cudart(), buffer.data_ptr()
        status = int(runtime.cudaHostRegister(address, buffer.nbytes, 0))
        if status != 0:
            raise MemoryError(
                f"CUDA cannot pin {buffer.nbytes:,} bytes of host memory (error {status}); raise the limit of "
                "locked memory (ulimit -l) or lower host_budget"
            )
        weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)
    return buffer
