"""calibrate: what is measured is kept and told, a busy machine changes nothing, and without a GPU it says so."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from geminifx.compiler.cli import calibrate as command
from geminifx.compiler.cli.calibrate import BUSY
from geminifx.compiler.cli.main import app
from geminifx.compiler.rates.calibrate import THOROUGH, BusyError
from geminifx.compiler.rates.identity import Identity
from geminifx.compiler.rates.kept import MachineRates, keep, kept_for, read
from geminifx.compiler.rates.presets import preset
from geminifx.compiler.rates.rates import Rates
from typer.testing import CliRunner, Result

MACHINE = Identity("NVIDIA H200", "13000", "13.0", "EPYC", 16, 1, "2.11.0")
OLD = replace(preset("h200"), name="NVIDIA H200, measured", memory_bytes_per_s=1e12)
LAUNCH_S = 33e-6
NEW = replace(OLD, memory_bytes_per_s=4e12, launch_s=LAUNCH_S)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Rates | BusyError]:
    """What measurements of a GPU bring, one after the other."""
    results: list[Rates | BusyError] = []

    def measured(device: torch.device, effort: object, ranks: object) -> Rates:
        assert device.type == "cuda" and effort is THOROUGH
        result = results.pop(0)
        if isinstance(result, BusyError):
            raise result
        return result

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "calibrate", measured)
    monkeypatch.setattr(command, "corrected_by_steps", lambda rates, device: replace(rates, launch_s=LAUNCH_S))
    monkeypatch.setattr(command.Identity, "of", lambda device, processes: MACHINE)
    monkeypatch.setattr(command.Device, "choose", lambda options: SimpleNamespace(torch_device=torch.device("cuda", 0)))
    return results


def calibrate(*words: str) -> Result:
    return CliRunner().invoke(app, ["calibrate", *words], env={"COLUMNS": "200"})


def test_what_is_measured_is_kept_and_told(found: list[Rates | BusyError]) -> None:
    keep(MachineRates(MACHINE, OLD))
    found.append(replace(NEW, launch_s=12e-6))
    result = calibrate("--output", "rates.json")
    assert result.exit_code == 0 and kept_for(MACHINE) == NEW and read(Path("rates.json")) == MachineRates(MACHINE, NEW)
    assert "measuring NVIDIA H200, EPYC" in result.output and "4e+03 G/s" in result.output
    assert "33 us" in result.output
    assert "kept in" in result.output and "TFLOP/s" in result.output


def test_a_busy_machine_keeps_what_was_measured_before(found: list[Rates | BusyError]) -> None:
    keep(MachineRates(MACHINE, OLD))
    found.append(BusyError("measured twice, launch_s are more than 15% apart; stop the other processes"))
    result = calibrate("--output", "rates.json")
    assert result.exit_code == BUSY and kept_for(MACHINE) == OLD and not Path("rates.json").exists()
    assert "Nothing was changed: measured twice, launch_s" in result.output


def test_without_a_cache_they_are_where_they_were_asked_for_or_nowhere(
    found: list[Rates | BusyError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    found += [NEW, NEW]
    assert "There is no cache to keep the rates in; name a file with --output" in calibrate().output
    assert "kept in rates.json" in calibrate("--output", "rates.json").output and read(Path("rates.json")).rates == NEW


def test_a_place_that_cannot_be_written_to_is_told(found: list[Rates | BusyError]) -> None:
    found.append(NEW)
    result = calibrate("--output", "nowhere/rates.json")
    assert result.exit_code == 2 and "nowhere" in result.output


def test_without_a_gpu_nothing_is_measured_and_that_is_said() -> None:
    result = calibrate()
    assert result.exit_code == 0
    assert "There is no CUDA device, so nothing was measured: plans use the rates of the arena in RAM." in " ".join(
        result.output.split()
    )
    assert "host params" in result.output and "at once" in result.output
