"""Copy engines that stand in for asynchronous hardware on a CPU: nothing is copied before somebody waits for it.

On CUDA a copy runs some time between its launch and the end of a wait for it. What a program may not rely on is
*when*: under `ImmediateCopies` a forgotten wait, or a source that is overwritten too early, goes unseen. These engines
run copies as late as is legal, in the order of their streams, so that both give other numbers.

Compute stays what it is on a CPU: an operator has run when its call returns. Two models of a wait follow from that.

- `LateCopies`: whoever waits for a copy, the device in `arrive` or the host in `finish`, finds all of it done.
- `OpenCopies`: `arrive` orders the device alone. Operators that are launched afterwards see the copy's result, so its
  device half runs there: what comes to the device is written, what leaves it is read. The host has waited for nothing:
  until it waits for the copy, or for anything that the device does after it, what was to come to the host has not
  come, and what is being read from the host must stay as it is. A source that has changed by then is a `violation`.

A mark is done when everything launched before it is: also the copies that its stream has waited for. Streams of the
device other than the copies' (`aside`, `exchange`) run what is launched in them at once, for want of an asynchronous
CPU, and wait for no more than they say.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from geminifx.runtime.isa.torch_private import unmetered
from torch import Tensor

Pairs = list[tuple[Tensor, Tensor]]
Halves = tuple[Callable[[], None], Callable[[], None]]
_LOCK = threading.RLock()
"""Held while copies run: several threads wait for them."""


@dataclass(eq=False)
class Work:
    """A copy, or a mark, and what it comes after. The device's half runs before the host knows that all is done."""

    after: tuple["Work", ...]
    device_half: Callable[[], None] = lambda: None
    host_half: Callable[[], None] = lambda: None
    launched: bool = False
    ended: bool = False

    def query(self) -> bool:
        """Whether the host may take it for done. Nobody is in a hurry: only if somebody has waited for it."""
        return self.ended

    def synchronize(self) -> None:
        """The host waits."""
        self.launch()
        with _LOCK:
            for work in self._pending(lambda work: work.ended):
                work.host_half()
                work.ended, work.after = True, ()
                work.device_half = work.host_half = lambda: None

    def launch(self) -> None:
        """The device waits."""
        with _LOCK:
            for work in self._pending(lambda work: work.launched):
                work.device_half()
                work.launched = True

    def _pending(self, is_done: Callable[["Work"], bool]) -> Iterator["Work"]:
        """This and all that it comes after, each behind what it comes after itself."""
        stack = [(self, False)]
        while stack:
            work, comes_next = stack.pop()
            if is_done(work):
                continue
            if comes_next:
                yield work
            else:
                stack.append((work, True))
                stack.extend((before, False) for before in work.after)


@dataclass
class Stream:
    """What the device does in order; `last` is what was put last, and `arrived` what it has waited for since."""

    last: Work | None = None
    arrived: list[Work] = field(default_factory=list)

    def before_next(self) -> tuple[Work, ...]:
        return (*self.arrived, *((self.last,) if self.last is not None else ()))


class LateCopies:
    """Each copy runs when somebody waits for it, behind those that its stream was given before. `violations` tells of
    sources on the host that were overwritten while they were copied."""

    opens = False
    """Whether `arrive` leaves the host's half of a copy to do."""

    def __init__(self) -> None:
        self.up, self.down = Stream(), Stream()
        self.violations: list[str] = []
        self.count = 0
        self._compute, self._side, self._between = Stream(), Stream(), Stream()
        self._current = threading.local()

    # -- the protocol of copy engines ----------------------------------------------------------------------

    def mark(self) -> Work | None:
        stream = self._stream
        with _LOCK:
            before = tuple(work for work in stream.before_next() if not work.ended)
            return self._put(stream, Work(before)) if before else None

    def to_device(self, target: Tensor, source: Tensor, *after: Work | None) -> Work:
        return self.all_to_device([(target, source)], *after)

    def to_host(self, target: Tensor, source: Tensor, *after: Work | None) -> Work:
        return self.all_to_host([(target, source)], *after)

    def all_to_device(self, pairs: Iterable[tuple[Tensor, Tensor]], *after: Work | None) -> Work:
        return self._copy(self.up, self._coming, pairs, after)

    def all_to_host(self, pairs: Iterable[tuple[Tensor, Tensor]], *after: Work | None) -> Work:
        return self._copy(self.down, self._leaving, pairs, after)

    def aside(self, *after: Work | None) -> AbstractContextManager[None]:
        return self._on(self._side, after)

    def exchange(self, *after: Work | None) -> AbstractContextManager[None]:
        return self._on(self._between, after)

    @contextmanager
    def _on(self, stream: Stream, after: tuple[Work | None, ...]) -> Iterator[None]:
        before = self._stream
        for work in after or (self.mark(),):
            self._arrive_in(stream, work)
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def arrive(self, arrival: Work | None) -> None:
        self._arrive_in(self._stream, arrival)

    def join(self) -> None:
        for stream in (self.up, self.down, self._side, self._between):
            for work in stream.before_next():
                self.arrive(work)

    def finish(self, arrival: Work | None) -> None:
        if arrival is not None:
            arrival.synchronize()

    # -- copies --------------------------------------------------------------------------------------------

    @property
    def _stream(self) -> Stream:
        """That of the calling thread's launches: threads share the device's default stream."""
        return getattr(self._current, "stream", self._compute)

    @staticmethod
    def _put(stream: Stream, work: Work) -> Work:
        stream.last, stream.arrived = work, []
        return work

    def _copy(self, stream: Stream, halves: Callable[[Pairs], Halves], pairs: Iterable[tuple[Tensor, Tensor]],
              after: tuple[Work | None, ...]) -> Work:  # fmt: skip
        self.count += 1
        found = [(target.detach(), source.detach()) for target, source in pairs]
        waited_for = tuple(work for work in after or (self.mark(),) if work is not None)
        with _LOCK:
            return self._put(stream, Work((*stream.before_next(), *waited_for), *halves(found)))

    def _coming(self, pairs: Pairs) -> Halves:
        read: list[tuple[Tensor, Tensor]] = []

        def device_half() -> None:
            with unmetered():
                for target, source in pairs:
                    target.copy_(source)
                read.extend((source, source.clone()) for _, source in pairs)
            pairs.clear()  # the device's memory is the program's again

        def host_half() -> None:
            for source, found in read:
                if not torch.equal(source.view(torch.uint8), found.view(torch.uint8)):
                    self.violations.append(f"{tuple(source.shape)} {source.dtype} was overwritten while it was copied")

        return device_half, host_half

    @staticmethod
    def _leaving(pairs: Pairs) -> Halves:
        found: list[tuple[Tensor, Tensor]] = []

        def device_half() -> None:
            with unmetered():
                found.extend((target, source.clone()) for target, source in pairs)
            pairs.clear()

        def host_half() -> None:
            with unmetered():
                for target, value in found:
                    target.copy_(value)

        return device_half, host_half

    def _arrive_in(self, stream: Stream, arrival: Work | None) -> None:
        if arrival is None:
            return
        if not self.opens:
            arrival.synchronize()
            return
        arrival.launch()
        with _LOCK:
            stream.arrived = [work for work in stream.arrived if not work.ended]
            if not arrival.ended:
                stream.arrived.append(arrival)


class OpenCopies(LateCopies):
    """As `LateCopies`, but a wait of the device tells the host nothing."""

    opens = True
