"""What a launch takes, measured on steps of a small model."""

import pytest
import torch
from geminifx.compiler import launches
from geminifx.compiler.launches import measured_launch_s

CPU = torch.device("cpu")


def test_seconds_of_a_step_are_divided_by_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_step_s", lambda model, optimizer, x: 1.0)
    counts = []
    for blocks in (2, 3, 4):
        monkeypatch.setattr(launches, "BLOCKS", blocks)
        counts.append(1 / measured_launch_s(CPU))
    assert counts[2] - counts[1] == pytest.approx(counts[1] - counts[0]), "each block has as many"
    assert counts[1] - counts[0] > 50


def small(monkeypatch: pytest.MonkeyPatch, steps: int, first: int) -> None:
    for name, value in (("BLOCKS", 1), ("STEPS", steps), ("FIRST", first)):
        monkeypatch.setattr(launches, name, value)


def test_the_first_steps_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for first in (1.0, 100.0):
        seconds = iter([first, first, first, first, 1.0, 1.0, 3.0])
        monkeypatch.setattr(launches, "_step_s", lambda model, optimizer, x, seconds=seconds: next(seconds))
        small(monkeypatch, steps=7, first=4)
        found.append(measured_launch_s(CPU))
    assert found[0] == found[1]


def test_steps_are_made_and_random_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, steps=3, first=1)
    torch.manual_seed(5)
    found, drawn = measured_launch_s(CPU), torch.rand(3)
    torch.manual_seed(5)
    assert found > 0 and torch.equal(drawn, torch.rand(3))
