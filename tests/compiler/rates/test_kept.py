"""The file of measured rates: whole, of this machine, nobody else's, and data alone."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from geminifx.compiler.rates import kept
from geminifx.compiler.rates.identity import Identity, _cpu_model
from geminifx.compiler.rates.kept import MachineRates, keep, kept_for, read, write
from geminifx.compiler.rates.presets import preset
from geminifx.runtime.isa.errors import ArgumentError

MACHINE = Identity("NVIDIA H200", "13000", "13.0", "EPYC", 16, 1, "2.11.0")
RATES = replace(preset("h200"), name="NVIDIA H200, measured")
KEPT = MachineRates(MACHINE, RATES)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "geminifx"


def kept_file(cache: Path) -> Path:
    (path,) = cache.glob("rates-*.json")
    return path


def test_what_is_kept_is_found_again(cache: Path) -> None:
    assert kept_for(MACHINE) is None
    path = keep(KEPT)
    assert path == kept_file(cache) and path.stat().st_mode & 0o777 == 0o600
    assert kept_for(MACHINE) == RATES
    newer = replace(RATES, memory_bytes_per_s=1.0)
    keep(MachineRates(MACHINE, newer))
    assert kept_for(MACHINE) == newer and list(cache.iterdir()) == [path], "nothing unfinished is left"


@pytest.mark.parametrize(
    "other",
    [{"gpu": "NVIDIA H100 80GB HBM3"}, {"driver": "12080"}, {"cuda": "12.8"}, {"cpu": "Xeon"}, {"cores": 8},
     {"processes": 2}, {"torch_version": "2.13.0"}],
)  # fmt: skip
def test_another_machine_is_another_file(cache: Path, other: dict[str, object]) -> None:
    keep(KEPT)
    assert kept_for(replace(MACHINE, **other)) is None


def test_a_file_under_another_machines_name_is_not_used(cache: Path) -> None:
    other = replace(MACHINE, gpu="NVIDIA A100-SXM4-80GB")
    keep(KEPT)
    os.rename(kept_file(cache), cache / kept._name(other))
    assert kept_for(other) is None


def test_damage_is_as_if_nothing_was_kept_at_every_byte(cache: Path) -> None:
    keep(KEPT)
    path, whole = kept_file(cache), kept_file(cache).read_bytes()
    for end in range(0, len(whole) - 2, 7):  # behind the last brace is a line's end alone
        path.write_bytes(whole[:end])
        assert kept_for(MACHINE) is None
    path.write_bytes(b"\xff" + whole)
    assert kept_for(MACHINE) is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_to_is_not_read(cache: Path, mode: int) -> None:
    keep(KEPT)
    kept_file(cache).chmod(mode)
    assert kept_for(MACHINE) is None
    keep(KEPT)
    assert kept_for(MACHINE) == RATES


def test_a_cache_that_others_can_write_to_is_not_used(cache: Path) -> None:
    keep(KEPT)
    cache.chmod(0o777)
    assert kept_for(MACHINE) is None and keep(KEPT) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_another_user_owns_is_not_read(cache: Path) -> None:
    keep(KEPT)
    os.chown(kept_file(cache), 12345, -1)
    assert kept_for(MACHINE) is None


def test_where_there_is_no_cache_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep(KEPT) is None and kept_for(MACHINE) is None


def _with(**changes: object) -> str:
    data = json.loads(kept.TEXT.write(KEPT, kept.strict_converter()))
    data["rates"] |= changes
    return json.dumps(data)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{}", "it has no version, expected 5; write a new one with geminifx calibrate --output FILE"),
        (json.dumps({"version": 1}), "its version is 1, expected 5"),
        ("[", "not a file of rates"),
        (_with(flops_per_s=1.0), "flops_per_s"),
        (_with(kernel_s="fast"), r"'fast', expected a number @ rates\.rates\.kernel_s"),
        (_with(overlaps=1), r"1, expected true or false @ rates\.rates\.overlaps"),
        (_with(up_bytes_per_s=-1.0), "up_bytes_per_s: -1.0; expected a number above 0"),
        (_with(memory_bytes_per_s=float("inf")), "inf, expected a number"),
        (_with(bf16={"flop": [2.0, 1.0], "flops_per_s": [1.0, 1.0]}), "expected increasing sizes"),
        (_with(bf16={"flop": [1.0]}), "it has no flops_per_s"),
    ],
)
def test_a_file_that_is_asked_for_is_read_or_told_what_is_wrong_with_it(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rates.json"
    write(KEPT, path)
    assert read(path) == KEPT
    path.write_text(text)
    with pytest.raises(ArgumentError, match=says) as refused:
        read(path)
    assert str(path) in str(refused.value)


def test_the_model_of_a_cpu_is_read_where_the_system_tells_it(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9554 64-Core Processor\nmodel name\t: another\n")
    assert _cpu_model(info) == "AMD EPYC 9554 64-Core Processor"
    assert isinstance(_cpu_model(tmp_path / "nowhere"), str)
