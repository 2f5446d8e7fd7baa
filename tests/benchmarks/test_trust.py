"""Predicted against measured: cells that are known are not measured again, and the table says how far off they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trust
from task import Task
from trust import errors, measure_all, parse_args, summary, table, tasks

SCRIPT = Path(trust.__file__)
CELL = {
    "model": "opt-1.3b", "batch": 8, "seq": 1024, "accumulate": 1, "microbatches": None, "budget": "24GB",
    "device": "NVIDIA H200", "torch": "2.11.0", "rates": "NVIDIA H200, measured", "binds": "device", "bound_s": 0.14,
    "predicted_s": 0.15, "measured_s": 0.16, "predicted_adapted_s": 0.153, "measured_adapted_s": 0.15,
    "predicted_bytes": 20_000, "measured_bytes": 19_000,
}  # fmt: skip
FAILED = {**{name: CELL[name] for name in (*trust.POINT, "device", "torch")}, "batch": 16, "error": "no | room"}
WORDS = ["--models", "opt-1.3b", "--budgets", "24GB", "none", "--batches", "8", "16", "--json", "trust.json"]


def test_what_is_known_is_not_measured_again_and_what_failed_is() -> None:
    args = parse_args(WORDS)
    assert len(tasks(args, "opt-1.3b", [])) == 4
    left = tasks(args, "opt-1.3b", [CELL, FAILED])
    assert [(task.budget, task.batch) for task in left] == [("24GB", 16), (None, 8), (None, 16)]
    assert len(tasks(parse_args([*WORDS, "--accumulate", "4"]), "opt-1.3b", [CELL])) == 4
    left = tasks(parse_args([*WORDS, "--microbatches", "auto", "4"]), "opt-1.3b", [CELL, {**CELL, "microbatches": 4}])
    assert [(task.budget, task.batch, task.microbatches) for task in left] == [
        ("24GB", 16, None), ("24GB", 16, 4), (None, 8, None), (None, 8, 4), (None, 16, None), (None, 16, 4),
    ]  # fmt: skip


def test_the_docs_have_cells_of_their_own() -> None:
    args = parse_args(["--docs", "--json", "trust.json", "--accumulate", "4", "--batches", "2"])
    found = {model: tasks(args, model, []) for model in trust.models(args)}
    assert sum(map(len, found.values())) >= 20 and len(found) == len({row[0] for row in trust.DOCS})
    assert all(task.accumulate == 1 and task.budget for each in found.values() for task in each)
    assert [task.microbatches for task in found["llama-3b"]] == [None, None, 8, 16]
    assert not trust.models(parse_args(["--json", "trust.json"]))


def test_no_cell_is_begun_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], list[int]()

    def measured(task: Task) -> trust.Cell:
        now[0] += 40.0
        return {"measured_s": 1.0}

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(trust, "measure", measured)
    monkeypatch.setattr(trust.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(trust, "tell", lambda result: told.append(len(result.get("cells", ()))))
    monkeypatch.setattr(trust.os, "_exit", end)
    with pytest.raises(SystemExit):
        trust.work(tasks(parse_args(WORDS), "opt-1.3b", []), 100.0)
    assert told == [1, 2, 0], "a third one would end after 120 s"


def test_cells_of_several_goes_are_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trust.json"
    file.write_text(json.dumps([CELL, FAILED]))
    found = [{**CELL, "batch": 16}, {**CELL, "budget": None}]
    monkeypatch.setattr(trust, "run_worker", lambda *_, **__: {"cells": found, "error": "it ended early"})
    measure_all(parse_args([*WORDS[:-1], str(file)]))
    assert json.loads(file.read_text()) == [CELL, *found]


def test_the_table_says_how_far_off_predictions_are() -> None:
    slower = {**CELL, "batch": 1, "predicted_s": 0.2, "measured_bytes": 25_000}
    assert errors([CELL, slower], "s") == pytest.approx([-0.0625, 0.25])
    assert summary([CELL, slower, FAILED]) == (
        "2 cells: step 15.6% off on average, 25.0% at worst; "
        "step after the warm-up 2.0% off on average, 2.0% at worst; "
        "device peak 12.6% off on average, 20.0% at worst; "
        "1 peaks above the planned ones."
    )
    assert "| opt-1.3b | 8 x 1024, 4 microbatches | 24GB |" in table([{**CELL, "microbatches": 4}])
    lines = table([CELL, FAILED]).splitlines()
    assert lines[-2] == (
        "| opt-1.3b | 8 x 1024 | 24GB | 0.160 s | 0.150 s | -6.2% | device | 0.140 s "
        "| 0.150 s | 0.153 s | +2.0% | 95.0% |"
    )
    assert lines[-1] == "| opt-1.3b | 16 x 1024 | 24GB | no / room | | | | | | | | |"
    assert "NVIDIA H200, torch 2.11.0, at the rates of NVIDIA H200, measured." in lines
    assert len({text.count("|") for text in lines[-4:]}) == 1


@pytest.mark.slow
def test_the_command_measures_on_any_machine(tmp_path: Path) -> None:
    words = ["--models", "mini", "--budgets", "none", "1kB", "--batches", "2", "--seq", "32", "--json", "trust.json",
             "--table", "trust.md"]  # fmt: skip
    subprocess.run([sys.executable, str(SCRIPT), *words], cwd=tmp_path, check=True)
    good, refused = json.loads((tmp_path / "trust.json").read_text())
    assert good["measured_s"] > 0 < good["predicted_adapted_s"] and good["rates"] == "the arena in RAM"
    assert good["predicted_s"] > 0.999 * good["bound_s"] > 0
    assert 0 < good["measured_bytes"] <= good["predicted_bytes"]
    assert "smallest" in refused["error"] or "budget" in refused["error"]
    assert "| opt-mini |" in (tmp_path / "trust.md").read_text()
