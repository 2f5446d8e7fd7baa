"""The host's worker: one thread that updates training states while the device computes."""

import atexit
import bisect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

from ..isa.errors import StateError
from ..memory.streams import Arrival, CopyEngine

_POLL_S = 1.0
_EXIT_S = 10.0


class Ticket:
    """Work under way. `arrival` tells when what the work launched on the device is done; it is known only
    once the work itself is, and waiting on it any earlier would silently wait for nothing."""

    def __init__(self, arrival: Arrival = None, done: bool = False) -> None:
        self.arrival = arrival
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._next: Callable[[Arrival], Arrival] | None = None
        if done:
            self._done.set()

    def then(self, action: Callable[[Arrival], Arrival]) -> None:
        """Let `action` follow on the same thread: it takes the arrival so far and gives the new one."""
        with self._lock:
            if not self._done.is_set():
                self._next = action
                return
        self.arrival = action(self.arrival)

    def forget(self) -> None:
        """Let nothing follow that has not begun; what has is launched when this returns."""
        with self._lock:
            self._next = None

    def complete(self, arrival: Arrival) -> None:
        with self._lock:
            action, self._next = self._next, None  # which holds the store of the tickets
            self.arrival = arrival if action is None else action(arrival)
            self._done.set()

    def give_up(self) -> None:
        self._done.set()

    def is_done(self, within_s: float) -> bool:
        return self._done.wait(within_s)


@dataclass(order=True)
class Job:
    """Work for the thread, once everything in `after` is done; `order` counts jobs, `name` is for messages."""

    priority: int
    order: int
    name: str = field(compare=False)
    work: Callable[[], Arrival] = field(compare=False)
    after: tuple[Arrival, ...] = field(compare=False)
    ticket: Ticket = field(compare=False, default_factory=Ticket)

    def is_ready(self) -> bool:
        try:
            return all(arrival is None or arrival.query() for arrival in self.after)
        except RuntimeError:
            return True  # what is wrong, `run` tells the one that waits for the job

    def block(self) -> None:
        """Block until the job is ready."""
        for arrival in self.after:
            if arrival is not None:
                arrival.synchronize()

    def run(self) -> None:
        self.block()
        self.ticket.complete(self.work())


class _Jobs:
    """The jobs that wait. Those with the same priority number keep their order."""

    def __init__(self) -> None:
        self._waiting: list[Job] = []
        self._ended = False
        self.changed = threading.Condition()

    def put(self, job: Job) -> None:
        with self.changed:
            bisect.insort(self._waiting, job)
            self.changed.notify()

    def end(self) -> None:
        """Let nobody take a further one."""
        with self.changed:
            self._ended = True
            self.changed.notify()

    def take(self) -> Job | None:
        """Block until a job is ready; of those that are, the lowest number's. None at the end.

        While none is, the one that was put first is waited for: the device, too, does what comes first first.
        """
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._waiting or self._ended)
                if self._ended:
                    return None
                ready = next((job for job in self._first_ones() if job.is_ready()), None)
                if ready is not None:
                    self._waiting.remove(ready)
                    return ready
                oldest = min(self._waiting, key=lambda job: job.order)
            with suppress(RuntimeError):
                oldest.block()

    def _first_ones(self) -> Iterator[Job]:
        for _, jobs in itertools.groupby(self._waiting, lambda job: job.priority):
            yield next(jobs)


class Worker:
    """Runs jobs, of those that are ready the one with the lowest priority number first.

    A job that fails ends all work, and the thread: the state that it was writing is half old and half new.
    """

    def __init__(self) -> None:
        self._jobs = _Jobs()
        self._order = itertools.count()
        self._failure: list[tuple[str, BaseException]] = []
        self._thread: threading.Thread | None = None

    def submit(self, priority: int, name: str, work: Callable[[], Arrival], *after: Arrival) -> Ticket:
        """Queue `work`, which returns what its own launches are waited for by, until all of `after` is done."""
        self.check()
        if self._thread is None:
            arguments = (self._jobs, self._failure)
            self._thread = threading.Thread(target=_serve, args=arguments, name="geminifx-host", daemon=True)
            self._thread.start()
            # Jobs hold the machine, which holds this worker: only the thread may keep the queue alive.
            _running[self._thread] = jobs = weakref.ref(self._jobs)
            weakref.finalize(self, _stop, jobs).atexit = False
        job = Job(priority, next(self._order), name, work, after)
        self._jobs.put(job)
        return job.ticket

    def wait(self, ticket: Ticket, name: str) -> Arrival:
        """Block until the work is done. Raises StateError where it failed, or the thread is dead."""
        while not ticket.is_done(_POLL_S):
            self.check(name)
        self.check(name)
        return ticket.arrival

    def check(self, name: str = "a chunk") -> None:
        """Raises StateError where a job has failed, or the thread has died; `name` is what waits for it."""
        if self._thread is not None and not self._thread.is_alive() and not self._failure:
            self._failure.append((name, RuntimeError("the worker thread is dead")))
        if self._failure:
            name, error = self._failure[0]
            raise StateError(_ended(name, f"{type(error).__name__}: {error}")) from error


class Tickets:
    """The work under way on every chunk's training state, by the chunk's number; `names` are for messages."""

    def __init__(self, worker: Worker, copies: CopyEngine, names: Callable[[int], str]) -> None:
        self.worker = worker
        self.copies = copies
        self._names = names
        self._tickets: dict[int, Ticket] = {}

    def submit(self, index: int, work: Callable[[], Arrival], *after: Arrival) -> None:
        """Let the worker do it once `after` is done, the chunks with low numbers first."""
        self._tickets[index] = self.worker.submit(index, self._names(index), work, *after)

    def put(self, index: int, arrival: Arrival) -> None:
        """Work that is launched already."""
        self._tickets[index] = Ticket(arrival, done=True)

    def get(self, index: int) -> Ticket | None:
        return self._tickets.get(index)

    def take(self, index: int) -> Arrival:
        """Block until the chunk's work is launched, and return what tells that it is done."""
        ticket = self._tickets.get(index)
        if ticket is None:
            return None
        arrival = self.worker.wait(ticket, self._names(index))
        self._tickets.pop(index, None)  # not before: who is interrupted while waiting still has to
        return arrival

    def forget(self) -> None:
        """Let nothing follow on the work under way any more."""
        for ticket in self._tickets.values():
            ticket.forget()

    def is_launched(self, index: int) -> bool:
        """Whether the chunk's work, if there is any, is done as far as the worker goes."""
        ticket = self._tickets.get(index)
        return ticket is None or ticket.is_done(0.0)

    def launched(self, index: int) -> None:
        """Block until that is so."""
        ticket = self._tickets.get(index)
        if ticket is not None:
            self.worker.wait(ticket, self._names(index))

    def arrive(self, index: int) -> None:
        """From here on what is launched sees the chunk as its last work leaves it."""
        self.copies.arrive(self.take(index))

    def finish(self, index: int) -> None:
        """Block until the chunk's work is done."""
        ticket = self._tickets.get(index)
        if ticket is not None:
            self.copies.finish(self.worker.wait(ticket, self._names(index)))


def _ended(name: str, reason: str) -> str:
    return (
        f"the update of {name} on the host failed ({reason}). Some parameters are of this step and some of the one "
        "before, so that this run cannot go on: build the model anew and load the last checkpoint"
    )


_Held: TypeAlias = "weakref.ref[_Jobs]"
_running: "weakref.WeakKeyDictionary[threading.Thread, _Held]" = weakref.WeakKeyDictionary()


def _stop(held: _Held) -> None:
    jobs = held()
    if jobs is not None:
        jobs.end()


@atexit.register
def _stop_all() -> None:
    """Python ends threads that still run by force when it exits, which aborts a process in the middle of a kernel."""
    for thread, jobs in list(_running.items()):
        _stop(jobs)
        thread.join(_EXIT_S)


def _serve(jobs: _Jobs, failure: list[tuple[str, BaseException]]) -> None:
    while not failure:
        job = jobs.take()
        if job is None:
            return
        try:
            job.run()
        except BaseException as error:  # whatever it is, the training thread must hear of it
            failure.append((job.name, error))
            job.ticket.give_up()
        del job  # it holds the machine
