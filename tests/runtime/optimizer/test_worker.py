"""The host's worker: what is most urgent first, and no failure goes unheard."""

import ctypes
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from geminifx.runtime.isa.errors import StateError
from geminifx.runtime.memory.streams import ImmediateCopies
from geminifx.runtime.optimizer import worker as worker_module
from geminifx.runtime.optimizer.worker import Ticket, Tickets, Worker


class Gate:
    """A job that waits until it is let go."""

    def __init__(self, worker: Worker) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.ticket = worker.submit(0, "the gate", self.run)
        assert self.entered.wait(10)

    def run(self) -> None:
        self.entered.set()
        assert self.opened.wait(10)


def arrival(name: str) -> Any:
    """Whatever a job returns is handed through: a name does for an event."""
    return name


def thread_of(worker: Worker) -> threading.Thread:
    assert worker._thread is not None
    return worker._thread


def test_of_jobs_that_wait_the_lowest_number_is_first_and_equal_ones_keep_their_order() -> None:
    worker, done = Worker(), []
    gate = Gate(worker)
    names = [(3, "c"), (1, "a"), (2, "b"), (1, "a again")]
    job = lambda name: lambda: done.append(name) or arrival(name)  # noqa: E731
    tickets = [worker.submit(priority, name, job(name)) for priority, name in names]
    assert not any(ticket.is_done(0) for ticket in tickets)
    gate.opened.set()
    assert [worker.wait(ticket, name) for ticket, (_, name) in zip(tickets, names, strict=True)] == [
        n for _, n in names
    ]
    assert done == ["a", "a again", "b", "c"]


class Copy:
    """A copy under way, as an event on the device tells of it."""

    def __init__(self) -> None:
        self.done, self.waited_for = threading.Event(), threading.Event()

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        self.waited_for.set()
        assert self.done.wait(10)


def test_a_job_whose_copies_are_done_passes_those_that_still_wait_for_theirs() -> None:
    worker, done = Worker(), []
    gate, late, later = Gate(worker), Copy(), Copy()
    finished: Any = Copy()
    finished.done.set()

    def submit(priority: int, name: str, *after: Any) -> Ticket:
        return worker.submit(priority, name, lambda: done.append(name) or arrival(name), *after)

    submit(3, "first to wait", None, late)
    submit(1, "lowest, but last", later)
    submit(1, "its successor, ready", finished)
    worker_is_idle = submit(4, "ready", None, finished)
    gate.opened.set()
    assert worker.wait(worker_is_idle, "ready") == "ready"
    assert late.waited_for.wait(10) and not later.waited_for.is_set() and done == ["ready"]
    submit(2, "came while the thread waited")
    late.done.set()
    assert later.waited_for.wait(10) and done == ["ready", "came while the thread waited", "first to wait"]
    later.done.set()
    worker.wait(submit(5, "end"), "end")
    assert done[3:] == ["lowest, but last", "its successor, ready", "end"]


class Broken:
    """An event of a device that is lost."""

    def query(self) -> bool:
        raise RuntimeError("the device is lost")

    synchronize = query


def test_a_copy_that_fails_is_the_failure_of_the_job_that_waits_for_it() -> None:
    worker, broken = Worker(), Broken()
    ticket = worker.submit(0, "weight", lambda: None, broken)  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"the update of weight on the host failed \(RuntimeError: the device is lost"):
        worker.wait(ticket, "weight")


def test_what_follows_a_job_runs_on_its_thread_with_its_arrival() -> None:
    worker, seen = Worker(), []
    gate = Gate(worker)

    def follow(found: Any) -> Any:
        seen.append((found, threading.current_thread()))
        return arrival("copied")

    ticket = worker.submit(1, "chunk", lambda: arrival("updated"))
    ticket.then(follow)
    assert seen == []
    gate.opened.set()
    assert worker.wait(ticket, "chunk") == "copied"
    assert seen == [("updated", thread_of(worker))]
    # What comes when all is done runs at once, here.
    ticket.then(lambda found: arrival(f"{found} again"))
    assert worker.wait(ticket, "chunk") == "copied again"
    done = Ticket(arrival("streamed"), done=True)
    done.then(follow)
    assert seen[1:] == [("streamed", threading.current_thread())]
    assert worker.wait(done, "chunk") == "copied"


def failing() -> None:
    raise MemoryError("nothing left")


@pytest.mark.parametrize("where", ["in the job", "in what follows it"])
def test_a_failure_reaches_whoever_waits_and_everyone_after(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_POLL_S", 0.01)
    worker, ran = Worker(), []
    gate = Gate(worker)
    ticket = worker.submit(1, "weight, bias", failing if where == "in the job" else lambda: None)
    if where == "in what follows it":
        ticket.then(lambda _: failing())
    later = worker.submit(2, "other", lambda: ran.append(1))
    gate.opened.set()
    message = r"the update of weight, bias on the host failed \(MemoryError: nothing left\).*load the last checkpoint"
    acts: list[Callable[[], Any]] = [
        lambda: worker.wait(ticket, "weight, bias"),
        lambda: worker.wait(later, "other"),
        lambda: worker.submit(0, "a third", lambda: ran.append(2)),
        worker.check,
    ]
    for act in acts:
        with pytest.raises(StateError, match=message) as raised:
            act()
        assert isinstance(raised.value.__cause__, MemoryError)
    thread_of(worker).join(10)
    assert not thread_of(worker).is_alive() and ran == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_noticed_by_whoever_waits_and_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_POLL_S", 0.01)
    worker = Worker()
    worker.wait(worker.submit(0, "first", lambda: None), "first")
    thread = thread_of(worker)
    # From outside, while it waits for work: it notices when it is woken.
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    with worker._jobs.changed:
        worker._jobs.changed.notify()
    thread.join(10)
    assert not thread.is_alive()
    pending = Ticket()
    with pytest.raises(StateError, match=r"the update of layer\.weight on the host failed .*the worker thread is dead"):
        worker.wait(pending, "layer.weight")
    for act in (worker.check, lambda: worker.submit(0, "next", lambda: None)):
        with pytest.raises(StateError, match=r"layer\.weight on the host failed .*the worker thread is dead"):
            act()


def test_the_thread_ends_with_the_worker() -> None:
    worker = Worker()
    held = weakref.ref(worker)
    worker.wait(worker.submit(0, "job", lambda: None), "job")
    thread = thread_of(worker)
    del worker
    gc.collect()
    thread.join(10)
    assert held() is None and not thread.is_alive()


class Machine:
    """Jobs are methods of what holds the worker."""

    def __init__(self) -> None:
        self.worker = Worker()

    def job(self) -> None:
        raise MemoryError


def test_jobs_that_were_never_run_keep_nobody_alive() -> None:
    machine = Machine()
    gate = Gate(machine.worker)
    tickets = [machine.worker.submit(number, "job", machine.job) for number in (1, 2, 3)]
    gate.opened.set()
    with pytest.raises(StateError):
        machine.worker.wait(tickets[0], "job")
    thread_of(machine.worker).join(10)
    held = weakref.ref(machine)
    del machine, gate, tickets
    gc.collect()
    assert held() is None


def test_a_worker_that_nobody_used_has_no_thread() -> None:
    before = threading.active_count()
    worker = Worker()
    worker.check()
    assert threading.active_count() == before


@pytest.mark.slow
def test_python_exits_after_the_job_that_runs() -> None:
    """A thread that is ended by force in the middle of an operator aborts the process."""
    script = (
        "import threading, torch\n"
        "from geminifx.runtime.optimizer.worker import Worker\n"
        "worker, x, begun = Worker(), torch.ones(400, 400), threading.Event()\n"
        "def job():\n"
        "    begun.set()\n"
        "    for _ in range(500):\n"
        "        x @ x\n"
        "    print('done', flush=True)\n"
        "worker.submit(0, 'job', job)\n"
        "begun.wait(10)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_waiting_does_not_hold_the_job_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job ends when whoever waits for it has looked in vain."""
    monkeypatch.setattr(worker_module, "_POLL_S", 0.001)
    worker, looked, check = Worker(), threading.Event(), Worker.check
    monkeypatch.setattr(Worker, "check", lambda self, *name: looked.set() if name else check(self, *name))
    ticket = worker.submit(0, "slow", lambda: arrival("late") if looked.wait(10) else arrival("never"))
    assert worker.wait(ticket, "slow") == "late"


def test_who_is_interrupted_while_it_waits_still_has_to() -> None:
    worker = Worker()
    tickets, gate = Tickets(worker, ImmediateCopies(), str), Gate(worker)
    tickets._tickets[0] = gate.ticket
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "wait", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tickets.take(0)
    assert tickets.get(0) is gate.ticket and not tickets.is_launched(0)
    gate.opened.set()
    tickets.take(0)
    assert tickets.get(0) is None
