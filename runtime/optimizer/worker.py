"""The host worker: one thread that updates training states while the device computes."""

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
    """Work under way. `arrival` signals the end of what the work launched on the device. It is set only once the work
    itself is done; waiting on it any earlier would wait for nothing."""

    def __init__(self, arrival: Arrival = None, done: bool = False) -> None:
        self.arrival = arrival
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._next: Callable[[Arrival], Arrival] | None = None
        if done:
            self._done.set()

    def then(self, action: Callable[[Arrival], Arrival]) -> None:
        """Runs `action` after the work, on the same thread; it takes the arrival so far and returns the new one."""
        with self._lock:
            if not self._done.is_set():
                self._next = action
                return
        self.arrival = action(self.arrival)

    def forget(self) -> None:
        """Drops a follow-up that has not begun; one that has is launched by the time this returns."""
        with self._lock:
            self._next = None

    def complete(self, arrival: Arrival) -> None:
        with self._lock:
            action, self._next = self._next, None  # the action refers to the store that holds the tickets
            self.arrival = arrival if action is None else action(arrival)
            self._done.set()

    def give_up(self) -> None:
        self._done.set()

    def is_done(self, within_s: float) -> bool:
        return self._done.wait(within_s)


@dataclass(order=True)
class Job:
    """Work for the thread once everything in `after` is done. `order` counts jobs; `name` is for messages."""

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
            return True  # `run` meets the same error and reports it to whoever waits for the job

    def block(self) -> None:
        """Blocks until the job is ready."""
        for arrival in self.after:
            if arrival is not None:
                arrival.synchronize()

    def run(self) -> None:
        self.block()
        self.ticket.complete(self.work())


class _Jobs:
    """The queue of jobs. Jobs of the same priority keep their order."""

    def __init__(self) -> None:
        self._waiting: list[Job] = []
        self._ended = False
        self.changed = threading.Condition()

    def put(self, job: Job) -> None:
        with self.changed:
            bisect.insort(self._waiting, job)
            self.changed.notify()

    def end(self) -> None:
        """Makes `take` return None from now on."""
        with self.changed:
            self._ended = True
            self.changed.notify()

    def take(self) -> Job | None:
        """Blocks until a job is ready and returns the ready one with the lowest priority number; None after `end`.

        While none is ready, it waits for the job that was queued first: the device works in order, too.
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
    """Runs jobs: of those that are ready, the one with the lowest priority number first.

    A job that fails ends the thread and all further work, because the state it was writing is half old and half new.
    """

    def __init__(self) -> None:
        self._jobs = _Jobs()
        self._order = itertools.count()
        self._failure: list[tuple[str, BaseException]] = []
        self._thread: threading.Thread | None = None

    def submit(self, priority: int, name: str, work: Callable[[], Arrival], *after: Arrival) -> Ticket:
        """Queues `work`, to run once all of `after` is done; it returns the arrival of what it launched."""
        self.check()
        if self._thread is None:
            arguments = (self._jobs, self._failure)
            self._thread = threading.Thread(target=_serve, args=arguments, name="geminifx-host", daemon=True)
            self._thread.start()
            # Jobs refer to the machine, which holds this worker: only the thread may keep the queue alive.
            _running[self._thread] = jobs = weakref.ref(self._jobs)
            weakref.finalize(self, _stop, jobs).atexit = False
        job = Job(priority, next(self._order), name, work, after)
        self._jobs.put(job)
        return job.ticket

    def wait(self, ticket: Ticket, name: str) -> Arrival:
        """Blocks until the work is done. Raises StateError if it failed or the thread is dead."""
        while not ticket.is_done(_POLL_S):
            self.check(name)
        self.check(name)
        return ticket.arrival

    def check(self, name: str = "a chunk") -> None:
        """Raises StateError if a job has failed or the thread has died; `name` says what was waiting, for the
        message."""
        if self._thread is not None and not self._thread.is_alive() and not self._failure:
            self._failure.append((name, RuntimeError("the worker thread is dead")))
        if self._failure:
            name, error = self._failure[0]
            raise StateError(_ended(name, f"{type(error).__name__}: {error}")) from error


class Tickets:
    """The work under way on each chunk's training state, by chunk index; `names` are for messages."""

    def __init__(self, worker: Worker, copies: CopyEngine, names: Callable[[int], str]) -> None:
        self.worker = worker
        self.copies = copies
        self._names = names
        self._tickets: dict[int, Ticket] = {}

    def submit(self, index: int, work: Callable[[], Arrival], *after: Arrival) -> None:
        """Queues work on a chunk, to run once `after` is done; chunks with low indices go first."""
        self._tickets[index] = self.worker.submit(index, self._names(index), work, *after)

    def put(self, index: int, arrival: Arrival) -> None:
        """Records work that is launched already."""
        self._tickets[index] = Ticket(arrival, done=True)

    def get(self, index: int) -> Ticket | None:
        return self._tickets.get(index)

    def take(self, index: int) -> Arrival:
        """Blocks until the chunk's work is launched, and returns the arrival that signals its end."""
        ticket = self._tickets.get(index)
        if ticket is None:
            return None
        arrival = self.worker.wait(ticket, self._names(index))
        self._tickets.pop(index, None)  # only now: if the wait is interrupted, it must be repeated
        return arrival

    def forget(self) -> None:
        """Drops all follow-ups that have not begun."""
        for ticket in self._tickets.values():
            ticket.forget()

    def is_launched(self, index: int) -> bool:
        """Whether the worker is done with the chunk; what it launched on the device may still run."""
        ticket = self._tickets.get(index)
        return ticket is None or ticket.is_done(0.0)

    def launched(self, index: int) -> None:
        """Blocks until the worker is done with the chunk."""
        ticket = self._tickets.get(index)
        if ticket is not None:
            self.worker.wait(ticket, self._names(index))

    def arrive(self, index: int) -> None:
        """Orders what is launched from now on behind the chunk's last work."""
        self.copies.arrive(self.take(index))

    def finish(self, index: int) -> None:
        """Blocks until the chunk's work is done, on the device too."""
        ticket = self._tickets.get(index)
        if ticket is not None:
            self.copies.finish(self.worker.wait(ticket, self._names(index)))


def _ended(name: str, reason: str) -> str:
    return (
        f"the update of {name} on the host failed ({reason}). Some parameters have the values of this step and others "
        "those of the step before, so this run cannot continue: build the model again and load the last checkpoint"
    )


_Held: TypeAlias = "weakref.ref[_Jobs]"
_running: "weakref.WeakKeyDictionary[threading.Thread, _Held]" = weakref.WeakKeyDictionary()


def _stop(held: _Held) -> None:
    jobs = held()
    if jobs is not None:
        jobs.end()


@atexit.register
def _stop_all() -> None:
    """Stops the threads before Python exits: it kills threads that still run, and one that dies in the middle of a
    kernel aborts the process."""
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
        except BaseException as error:  # the training thread must learn of any error
            failure.append((job.name, error))
            job.ticket.give_up()
        del job  # it refers to the machine
