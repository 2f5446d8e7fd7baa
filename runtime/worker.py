"""The host's worker: one thread that updates training states while the device computes."""

import atexit
import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from .errors import StateError
from .streams import Arrival, CopyEngine

_POLL_S = 1.0
_EXIT_S = 10.0
_END = (-1, -1, None)
"""Sorts before every job."""


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

    def complete(self, arrival: Arrival) -> None:
        with self._lock:
            self.arrival = arrival if self._next is None else self._next(arrival)
            self._done.set()

    def give_up(self) -> None:
        self._done.set()

    def is_done(self, within_s: float) -> bool:
        return self._done.wait(within_s)


class Worker:
    """Runs jobs, of those that wait the one with the lowest priority number first.

    A job that fails ends all work, and the thread: the state that it was writing is half old and half new.
    """

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[Any] = queue.PriorityQueue()
        self._order = itertools.count()
        self._failure: list[tuple[str, BaseException]] = []
        self._thread: threading.Thread | None = None

    def submit(self, priority: int, name: str, work: Callable[[], Arrival]) -> Ticket:
        """Queue `work`, which returns what its own launches are waited for by; `name` is for messages."""
        self.check()
        if self._thread is None:
            arguments = (self._jobs, self._failure)
            self._thread = threading.Thread(target=_serve, args=arguments, name="geminifx-host", daemon=True)
            self._thread.start()
            # Jobs hold the machine, which holds this worker: only the thread may keep the queue alive.
            _running[self._thread] = jobs = weakref.ref(self._jobs)
            weakref.finalize(self, _stop, jobs).atexit = False
        ticket = Ticket()
        self._jobs.put((priority, next(self._order), (name, work, ticket)))
        return ticket

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

    def submit(self, index: int, work: Callable[[], Arrival]) -> None:
        """Let the worker do it, the chunks with low numbers first."""
        self._tickets[index] = self.worker.submit(index, self._names(index), work)

    def put(self, index: int, arrival: Arrival) -> None:
        """Work that is launched already."""
        self._tickets[index] = Ticket(arrival, done=True)

    def get(self, index: int) -> Ticket | None:
        return self._tickets.get(index)

    def take(self, index: int) -> Arrival:
        """Block until the chunk's work is launched, and return what tells that it is done."""
        ticket = self._tickets.pop(index, None)
        return None if ticket is None else self.worker.wait(ticket, self._names(index))

    def arrive(self, index: int) -> None:
        """From here on what is launched sees the chunk as its last work leaves it."""
        self.copies.arrive(self.take(index))

    def arrive_all(self) -> None:
        for index in list(self._tickets):
            self.arrive(index)

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


_Jobs: TypeAlias = "weakref.ref[queue.PriorityQueue[Any]]"
_running: "weakref.WeakKeyDictionary[threading.Thread, _Jobs]" = weakref.WeakKeyDictionary()


def _stop(jobs: _Jobs) -> None:
    queued = jobs()
    if queued is not None:
        queued.put(_END)


@atexit.register
def _stop_all() -> None:
    """Python ends threads that still run by force when it exits, which aborts a process in the middle of a kernel."""
    for thread, jobs in list(_running.items()):
        _stop(jobs)
        thread.join(_EXIT_S)


def _serve(jobs: "queue.PriorityQueue[Any]", failure: list[tuple[str, BaseException]]) -> None:
    while not failure:
        _, _, job = jobs.get()
        if job is None:
            return
        name, work, ticket = job
        try:
            ticket.complete(work())
        except BaseException as error:  # whatever it is, the training thread must hear of it
            failure.append((name, error))
            ticket.give_up()
        del job, work, ticket  # a job holds the machine
