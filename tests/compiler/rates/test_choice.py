"""At which rates a model is planned."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from geminifx.compiler.options import Options
from geminifx.compiler.rates import choice
from geminifx.compiler.rates.calibrate import AUTOMATIC, BusyError
from geminifx.compiler.rates.choice import given_rates, known_card, rates_of
from geminifx.compiler.rates.identity import Identity
from geminifx.compiler.rates.kept import MachineRates, keep, kept_for, write
from geminifx.compiler.rates.presets import preset
from geminifx.compiler.rates.rates import ARENA, Rates
from geminifx.runtime.isa.errors import ArgumentError
from optimizing import NET
from zoo import compiled

MACHINE = Identity("NVIDIA H200", "13000", "13.0", "EPYC", 16, 1, "2.11.0")
UNKNOWN = replace(MACHINE, gpu="NVIDIA A10")
MEASURED = replace(preset("h200"), name="NVIDIA H200, measured", memory_bytes_per_s=4e12)
CUDA, ROOM = torch.device("cuda"), AUTOMATIC.needed_bytes


class Machine:
    """A GPU whose measuring is counted, and goes wrong where it is `busy`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.measured, self.busy, self.identity = 0, False, MACHINE
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(choice, "calibrate", self.calibrate)
        monkeypatch.setattr(choice.Identity, "of", lambda _, processes: replace(self.identity, processes=processes))

    def calibrate(self, device: torch.device, effort: object) -> Rates:
        assert effort is AUTOMATIC
        if self.busy:
            raise BusyError("the GPU is 93 % busy already")
        self.measured += 1
        return MEASURED


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path / "cache")


def test_a_new_machine_is_measured_once_and_says_so_in_one_line(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.identity = UNKNOWN
    assert rates_of(CUDA, None, 1, ROOM) == MEASURED
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "geminifx: measured NVIDIA A10 and its host, once; geminifx calibrate measures more precisely"
    assert rates_of(CUDA, None, 1, ROOM) == MEASURED and machine.measured == 1
    assert capsys.readouterr().err == ""


def test_without_a_cache_that_line_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    machine.identity = UNKNOWN
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert rates_of(CUDA, None, 1, ROOM) == MEASURED
    assert "for this run: there is no cache to keep it in" in capsys.readouterr().err


def test_a_busy_machine_is_planned_for_by_its_preset_and_measured_later(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.identity, machine.busy = UNKNOWN, True
    assert rates_of(CUDA, None, 1, ROOM) == known_card(UNKNOWN.gpu) and kept_for(UNKNOWN) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "the rates of the preset h100-sxm (NVIDIA A10 is unknown" in line and "93 % busy" in line
    machine.busy = False
    assert rates_of(CUDA, None, 1, ROOM) == MEASURED


def test_a_busy_machine_keeps_the_rates_that_it_has(machine: Machine) -> None:
    machine.busy = True
    keep(MachineRates(MACHINE, MEASURED))
    assert rates_of(CUDA, None, 1, ROOM) == MEASURED


@pytest.mark.parametrize("processes, room_bytes", [(2, ROOM), (1, ROOM - 1)], ids=["several processes", "no room"])
def test_where_it_cannot_be_measured_its_preset_is_used(machine: Machine, processes: int, room_bytes: int) -> None:
    assert rates_of(CUDA, None, processes, room_bytes) == preset("h200") and machine.measured == 0


def test_a_known_card_is_measured_only_where_somebody_asks_for_it(machine: Machine) -> None:
    assert rates_of(CUDA, None, 1, ROOM) == preset("h200") and machine.measured == 0
    keep(MachineRates(MACHINE, MEASURED))
    assert rates_of(CUDA, None, 1, ROOM) == MEASURED


def test_another_card_s_preset_says_that_it_is_another_s(machine: Machine) -> None:
    machine.identity = UNKNOWN
    found = rates_of(CUDA, None, 2, ROOM)
    assert found.name == "the preset h100-sxm (NVIDIA A10 is unknown; geminifx calibrate measures it)"
    assert known_card("NVIDIA GeForce RTX 4090").name == "the preset rtx4090"


def test_what_is_asked_for_is_not_measured(machine: Machine) -> None:
    assert rates_of(CUDA, preset("v100"), 1, ROOM) == preset("v100") and machine.measured == 0


def test_without_a_gpu_the_arena_has_its_own(machine: Machine) -> None:
    assert rates_of(torch.device("cpu"), None, 1, ROOM) is ARENA and machine.measured == 0


def test_rates_are_named_or_given(tmp_path: Path) -> None:
    write(MachineRates(MACHINE, MEASURED), tmp_path / "mine.json")
    assert Options.of({"rates": "rtx4090"}).rates == preset("rtx4090")
    assert Options.of({"rates": tmp_path / "mine.json"}).rates == MEASURED
    assert Options.of({"rates": MEASURED}).rates is MEASURED and Options.of({}).rates is None
    (tmp_path / "config.toml").write_text('rates = "a100-sxm"\n')
    assert Options.of({"config": tmp_path / "config.toml"}).rates == preset("a100-sxm")


@pytest.mark.parametrize(
    "given, says",
    [("rtx4080", r"rates='rtx4080'; expected the name of a card \(rtx2060, .*did you mean 'rtx4090'"),
     ("nowhere.json", "rates='nowhere.json' cannot be read"), (24, "rates=24; expected the name of a card"),
     ("", "rates=''; expected the name of a card")],
)  # fmt: skip
def test_other_rates_are_refused(given: object, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        given_rates(given)  # type: ignore[arg-type]


def test_a_plan_for_another_card_is_another_plan_and_says_for_which() -> None:
    """Of what computes next to nothing launches bind, which are alike."""
    plans = [compiled(NET, rates=name).plan for name in ("v100", "h200")]
    for plan, name in zip(plans, ("v100", "h200"), strict=True):
        assert plan.estimate.rates == f"the preset {name}" and f"at the rates of the preset {name}" in str(plan)
        assert plan.estimate.binds == "launches" and plan.estimate.bound_s == pytest.approx(plan.estimate.step_s)
    assert plans[0].estimate.peak_bytes == plans[1].estimate.peak_bytes
