"""How long copies take together, where several streams copy the same way."""

from threading import Thread

import pytest
import torch
from geminifx.runtime.memory import traffic
from geminifx.runtime.memory.hardware import Hardware
from geminifx.runtime.memory.traffic import Direction, Traffic


class Clock:
    """Tells one time after the other."""

    def __init__(self, *times_s: float) -> None:
        self.times_s = list(times_s)

    def __call__(self, on_cuda: bool) -> float:
        assert not on_cuda
        return self.times_s.pop(0)


def test_copies_are_counted_by_direction_and_what_overlaps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "moment", Clock(0.0, 1.0, 4.0, 2.0, 5.0, 7.0, 8.0))
    watched = Traffic()
    watched.begin()
    with watched.copying(Direction.UP, False), watched.copying(Direction.UP, False):  # from 0 to 2, from 1 to 4
        pass
    with watched.copying(Direction.DOWN, False):
        pass
    assert watched.end() == {Direction.UP: 4.0, Direction.DOWN: 2.0}


def test_nothing_is_noted_while_nobody_wants_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "moment", Clock())
    watched = Traffic()
    with watched.copying(Direction.UP, False):
        pass
    assert watched.end() == {Direction.UP: 0.0, Direction.DOWN: 0.0}


def test_all_engines_of_a_machine_tell_the_same_traffic() -> None:
    hardware, source = Hardware(torch.device("cpu")), torch.ones(1000)
    hardware.traffic.begin()
    engines = [hardware.new_copies() for _ in range(2)]
    Thread(target=engines[0].to_device, args=(torch.empty(1000), source)).start()
    engines[1].all_to_host([(torch.empty(1000), source)])
    found = hardware.traffic.end()
    assert found[Direction.DOWN] > 0
