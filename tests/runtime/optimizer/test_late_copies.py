"""The engines that stand in for asynchronous copies, and what the machine owes a bus that is slower than it thinks."""

import threading

import geminifx
import pytest
import torch
from geminifx.runtime.isa.layout import Layout
from late_copies import LateCopies, OpenCopies
from torch import nn

ENGINES = pytest.mark.parametrize("engine", [LateCopies, OpenCopies])


@ENGINES
def test_a_copy_runs_when_it_is_waited_for_and_behind_those_before_it(engine: type[LateCopies]) -> None:
    copies, targets = engine(), [torch.zeros(3) for _ in range(3)]
    arrivals = [copies.to_device(target, torch.full((3,), i + 1.0)) for i, target in enumerate(targets)]
    assert [a.query() for a in arrivals] == [False] * 3 and not any(t.any() for t in targets)
    copies.arrive(arrivals[1])
    assert [t[0].item() for t in targets] == [1, 2, 0]
    copies.finish(arrivals[1])
    assert [a.query() for a in arrivals] == [True, True, False]
    copies.join()
    assert targets[2].eq(3).all() and not copies.violations


@ENGINES
def test_a_copy_comes_after_what_it_was_told_to(engine: type[LateCopies]) -> None:
    copies, there, here, back = engine(), torch.zeros(2), torch.ones(2), torch.zeros(2)
    down = copies.to_host(back, there, copies.to_device(there, here))
    copies.finish(down)
    assert back.eq(1).all()


@ENGINES
def test_whoever_forgets_to_wait_finds_old_values(engine: type[LateCopies]) -> None:
    copies, there, host = engine(), torch.ones(2), torch.zeros(2)
    arrival = copies.to_host(host, there)
    there.fill_(5)  # before the copy has read it
    assert not host.any()
    copies.finish(arrival)
    assert host.eq(5).all()


def test_a_device_that_waits_tells_the_host_nothing() -> None:
    copies, there, host = OpenCopies(), torch.ones(2), torch.zeros(2)
    arrival = copies.to_host(host, there)
    copies.arrive(arrival)
    there.fill_(5)  # the device's own order
    assert not host.any() and not arrival.query()
    copies.finish(copies.mark())  # what comes after it is done, so it is
    assert host.eq(1).all() and arrival.query()


def test_a_source_that_is_overwritten_on_its_way_is_told() -> None:
    copies, there, host = OpenCopies(), torch.zeros(2), torch.ones(2)
    arrival = copies.to_device(there, host)
    copies.arrive(arrival)
    assert there.eq(1).all()
    host.fill_(2)
    copies.finish(arrival)
    assert copies.violations == ["(2,) torch.float32 was overwritten while it was copied"]


def test_work_aside_waits_for_what_it_says_alone() -> None:
    copies, one, other = OpenCopies(), torch.zeros(2), torch.zeros(2)
    first, second = (copies.to_device(target, torch.ones(2)) for target in (one, other))
    with copies.aside(first):
        assert one.eq(1).all() and not other.any()
        done = copies.mark()
    copies.finish(copies.mark())
    assert not first.query()
    copies.finish(done)
    assert first.query() and not second.query()


@pytest.mark.parametrize("updating", [False, True])
def test_weights_are_not_written_while_they_are_copied(updating: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an update under way the worker itself starts the next forward's copy; load_state_dict must wait for that."""
    monkeypatch.setattr("geminifx.runtime.memory.hardware.copy_engine", lambda device: OpenCopies())
    source, x = nn.Linear(8, 8), torch.ones(2, 8)
    model = geminifx.compile(source, placement="cpu", example_inputs=(x,))
    optimizer = model.optimizer(torch.optim.SGD, lr=1.0)
    machine, store, opened = model.session.machine, model.session.machine.store, threading.Event()
    saved = {name: torch.full_like(value, 99.0) for name, value in model.state_dict().items()}
    if updating:
        model(x).sum().backward()
        store.worker.submit(-1, "the gate", lambda: None if opened.wait(10) else pytest.fail("never opened"))
        optimizer.step()
    layout: Layout = model.plan.layout
    (chunk,) = layout.chunks
    fetched = machine.fetch(0, chunk.numel, chunk.dtype)  # the next forward's, while the update waits at the gate
    opened.set()
    machine.wait(fetched, 0)
    model.load_state_dict(saved)
    store.finish()
    for stream in (store.copies.up, store.copies.down):
        store.copies.finish(stream.last)
    assert store.copies.violations == []
