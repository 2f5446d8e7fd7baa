"""The benchmark of capacity, and that of state formats, on models small enough for a test."""

import csv
from pathlib import Path

import capacity
import pytest
import state_formats
from geminifx.runtime.isa.errors import BudgetError

TINY = ["--hidden", "64", "--layers", "3", "--heads", "2", "--vocab", "256", "--seq", "32", "--lr", "1e-3"]
BUDGETS = ["--device-budget", "1.5MB", "--host-budget", "5MB"]


@pytest.mark.parametrize("moments", ["exact", "int8"])
def test_a_model_that_fits_counts_and_the_plan_is_kept_to(moments: str) -> None:
    told = capacity.main([*TINY, *BUDGETS, "--moments", moments, "--steps", "5"])
    assert told["counts"] and len(told["losses"]) == 5
    assert told["device_peak_bytes"] <= told["planned_device_bytes"] <= 1_500_000
    assert told["planned_host_bytes"] <= 5_000_000


def test_fewer_steps_do_not_count() -> None:
    assert not capacity.main([*TINY, *BUDGETS, "--steps", "2"])["counts"]


def test_a_host_with_less_room_holds_a_model_whose_moments_take_less() -> None:
    """Of 300,000 parameters, states in 12, 8 and 6 bytes: what does not fit is told before anything is allocated."""
    small = [*TINY, "--plan-only", "--device-budget", "0.7MB"]
    told = {m: capacity.main([*small, "--host-budget", "8MB", "--moments", m]) for m in ("exact", "bf16", "int8")}
    exact, half, codes = (told[moments]["planned_host_bytes"] for moments in ("exact", "bf16", "int8"))
    assert codes < half < exact
    with pytest.raises(BudgetError, match="of host memory"):
        capacity.main([*small, "--host-budget", str(codes), "--moments", "exact"])


def test_curves_are_written_a_line_for_each_step(tmp_path: Path) -> None:
    file = tmp_path / "curves.csv"
    state_formats.main(["--steps", "3", "--hidden", "32", "--layers", "1", "--csv", str(file)])
    with file.open() as lines:
        header, *rows = csv.reader(lines)
    assert header == ["step", *state_formats.WAYS] and len(rows) == 3
    assert len(set(rows[0][1:])) == 1, "the first loss is before any update"
