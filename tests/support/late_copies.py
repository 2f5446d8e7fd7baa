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
device other than the copies' (`aside`, `collective`) run what is launched in them at once, for want of an asynchronous
CPU, and wait for no more than they say.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from geminifx.runtime.isa.torch_private import unmetered
from torch import Tensor

_LOCK = threading.RLock()
"""Held while copies run: several threads wait for them."""

Pairs = list[tuple[Tensor, Tensor]]


class Coming:
    """A copy from the host, of pairs of target and source."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.read: Pairs = []
        self.overwritten: list[str] = []

    def on_device(self) -> None:
        for target, source in self.pairs:
            target.copy_(source)
        self.read = [(source, source.clone()) for _, source in self.pairs]
        self.pairs = []  # the device's memory is the program's again

    def check(self) -> None:
        for source, found in self.read:
            if not torch.equal(source.view(torch.uint8), found.view(torch.uint8)):
                self.overwritten.append(f"{tuple(source.shape)} {source.dtype} was overwritten while it was copied")

    def read_again(self) -> None:
        """What the device writes there afterwards is in order."""
        self.read = [(source, source.clone()) for source, _ in self.read]

    def on_host(self) -> None:
        self.check()
        self.read = []


class Leaving:
    """A copy to the host, of pairs of target and source."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.left: Pairs = []

    def on_device(self) -> None:
        self.left = [(target, source.clone()) for target, source in self.pairs]
        self.pairs = []

    def on_host(self) -> None:
        for target, value in self.left:
            target.copy_(value)
        self.left = []


@dataclass(eq=False)
class Work:
    """A copy, or a mark, and what it comes after."""

    after: tuple["Work", ...]
    copy: Coming | Leaving | None = None
    launched: bool = False
    ended: bool = False

    def query(self) -> bool:
        """Whether the host may take it for done. Nobody is in a hurry: only if somebody has waited for it."""
        return self.ended

    def launch(self) -> None:
        """The device waits."""
        with _LOCK, unmetered():
            for work in self._all_before(lambda work: work.launched):
                if isinstance(work.copy, Coming):
                    work._let_arrive()
                if work.copy is not None:
                    work.copy.on_device()
                work.launched = True

    def _let_arrive(self) -> None:
        """It reads the host's memory as the device's copies before it have left it, whether the host knows or not."""
        before = [work.copy for work in self._all_before(lambda work: work.ended) if work is not self]
        coming = [copy for copy in before if isinstance(copy, Coming)]
        for copy in coming:
            copy.check()
        for copy in before:
            if isinstance(copy, Leaving):
                copy.on_host()
        for copy in coming:
            copy.read_again()

    def synchronize(self) -> None:
        """The host waits."""
        self.launch()
        with _LOCK, unmetered():
            for work in self._all_before(lambda work: work.ended):
                if work.copy is not None:
                    work.copy.on_host()
                work.ended, work.after = True, ()

    def _all_before(self, is_done: Callable[["Work"], bool]) -> list["Work"]:
        """This and all that it comes after but what is done, each behind what it comes after itself."""
        found: dict[Work, None] = {}
        stack = [(self, False)]
        while stack:
            work, comes_next = stack.pop()
            if comes_next:
                found[work] = None
            elif work not in found and not is_done(work):
                stack.append((work, True))
                stack.extend((before, False) for before in work.after)
        return list(found)


@dataclass
class Stream:
    """What the device does in order; `last` is what was put last, and `arrived` what it has waited for since."""

    last: Work | None = None
    arrived: list[Work] = field(default_factory=list)

    def before_next(self) -> tuple[Work, ...]:
        return (*self.arrived, *((self.last,) if self.last is not None else ()))


class Launches:
    """The stream of each thread's launches: the device's own, which all threads and engines share, or another."""

    def __init__(self) -> None:
        self._shared, self._local = Stream(), threading.local()

    @property
    def stream(self) -> Stream:
        return getattr(self._local, "stream", self._shared)

    @contextmanager
    def to(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.stream, stream
        try:
            yield
        finally:
            self._local.stream = before


class LateCopies:
    """Each copy runs when somebody waits for it, behind those that its stream was given before. Engines of one device
    share its `launches`."""

    opens = False
    """Whether `arrive` leaves the host's half of a copy to do."""

    def __init__(self, launches: Launches | None = None) -> None:
        self.launches = launches or Launches()
        self.up, self.down, self.side, self.between = Stream(), Stream(), Stream(), Stream()
        self.coming: list[Coming] = []

    @property
    def violations(self) -> list[str]:
        """Sources on the host that were overwritten while they were copied."""
        return [told for copy in self.coming for told in copy.overwritten]

    def mark(self) -> Work | None:
        stream = self.launches.stream
        with _LOCK:
            before = tuple(work for work in stream.before_next() if not work.ended)
            return self._put(stream, Work(before)) if before else None

    def to_device(self, target: Tensor, source: Tensor, *after: Work | None) -> Work:
        return self.all_to_device([(target, source)], *after)

    def to_host(self, target: Tensor, source: Tensor, *after: Work | None) -> Work:
        return self.all_to_host([(target, source)], *after)

    def all_to_device(self, pairs: Iterable[tuple[Tensor, Tensor]], *after: Work | None) -> Work:
        copy = Coming(_detached(pairs))
        self.coming.append(copy)
        return self._copy(self.up, copy, after)

    def all_to_host(self, pairs: Iterable[tuple[Tensor, Tensor]], *after: Work | None) -> Work:
        return self._copy(self.down, Leaving(_detached(pairs)), after)

    def aside(self, *after: Work | None) -> AbstractContextManager[None]:
        return self._on(self.side, after)

    def collective(self, *after: Work | None) -> AbstractContextManager[None]:
        return self._on(self.between, after)

    def arrive(self, arrival: Work | None) -> None:
        self._arrive_in(self.launches.stream, arrival)

    def join(self) -> None:
        for stream in (self.up, self.down, self.side, self.between):
            for work in stream.before_next():
                self.arrive(work)

    def finish(self, arrival: Work | None) -> None:
        if arrival is not None:
            arrival.synchronize()

    @contextmanager
    def _on(self, stream: Stream, after: tuple[Work | None, ...]) -> Iterator[None]:
        for work in after or (self.mark(),):
            self._arrive_in(stream, work)
        with self.launches.to(stream):
            yield

    def _copy(self, stream: Stream, copy: Coming | Leaving, after: tuple[Work | None, ...]) -> Work:
        waited_for = tuple(work for work in after or (self.mark(),) if work is not None)
        with _LOCK:
            return self._put(stream, Work((*stream.before_next(), *waited_for), copy))

    @staticmethod
    def _put(stream: Stream, work: Work) -> Work:
        stream.last, stream.arrived = work, []
        return work

    def _arrive_in(self, stream: Stream, arrival: Work | None) -> None:
        if arrival is None:
            return
        if not self.opens:
            arrival.synchronize()
            return
        arrival.launch()
        with _LOCK:
            stream.arrived = [work for work in (*stream.arrived, arrival) if not work.ended]


class OpenCopies(LateCopies):
    """As `LateCopies`, but a wait of the device tells the host nothing."""

    opens = True


def _detached(pairs: Iterable[tuple[Tensor, Tensor]]) -> Pairs:
    return [(target.detach(), source.detach()) for target, source in pairs]


BY_NAME = {"late": LateCopies, "open": OpenCopies}
ENGINES = ("immediate", *BY_NAME)
