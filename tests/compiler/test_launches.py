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


def test_steps_are_made_and_random_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BLOCKS", 1), ("STEPS", 3), ("FIRST", 1)):
        monkeypatch.setattr(launches, name, value)
    torch.manual_seed(5)
    found, drawn = measured_launch_s(CPU), torch.rand(3)
    torch.manual_seed(5)
    assert 1e-6 < found < 0.1 and torch.equal(drawn, torch.rand(3))
