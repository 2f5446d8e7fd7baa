"""The benchmark of capacity, and that of state formats, on models small enough for a test."""

import csv
from collections.abc import Iterator
from pathlib import Path

import capacity
import pytest
import state_formats
from geminifx.runtime.isa.errors import BudgetError
from shared_captures import shared_captures

TINY = ["--hidden", "64", "--layers", "3", "--heads", "2", "--vocab", "256", "--seq", "32", "--lr", "1e-3"]
BUDGETS = ["--device-budget", "1.5MB", "--host-budget", "5MB"]


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    """Most of these models are."""
    with shared_captures():
        yield


@pytest.mark.parametrize("moments", ["exact", "int8"])
def test_a_model_that_fits_counts_and_the_plan_is_kept_to(moments: str) -> None:
    told = capacity.main([*TINY, *BUDGETS, "--moments", moments, "--steps", "5"])
    assert told["counts"] and len(told["losses"]) == 5
    assert told["device_peak_bytes"] <= told["planned_device_bytes"] <= 1_500_000
    assert told["planned_host_bytes"] <= 5_000_000


TRAINED: dict[str, list[str]] = {
    "fp16": ["--precision", "fp16"],
    "adapters": ["--lora", "4"],
    "adapters beside codes of 4 bits": ["--lora", "4", "--frozen", "nf4"],
    "4 bytes": ["--row", "30b-8k", "--batch", "2"],
}


@pytest.mark.parametrize("name", TRAINED)
def test_other_formats_count_and_keep_to_their_plans(name: str) -> None:
    told = capacity.main([*TRAINED[name], *TINY, *BUDGETS, "--steps", "5"])
    assert told["counts"] and told["device_peak_bytes"] <= told["planned_device_bytes"]


def test_rows_are_options_that_others_overrule() -> None:
    args = capacity.arguments(["--row", "70b-qlora", "--batch", "2"])
    assert (args.model, args.lora, args.frozen, args.batch, args.host_budget) == ("llama-70b", 16, "nf4", 2, "50GB")
    assert capacity.arguments([]).batch == 1
    for row in capacity.ROWS:
        assert capacity.config(capacity.arguments(["--row", row])).num_hidden_layers >= 32


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
