"""Two processes whose homes move in training: together, by what one of them lacks or has measured, and bit for bit."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finder

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from adapting_worker import CASES  # noqa: E402

pytestmark = pytest.mark.xdist_group("adapting")  # they share what the processes find
Finder = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Finder:
    return finder(HERE / "adapting_worker.py", tmp_path_factory.mktemp("ranks"), {2: (tuple(CASES),)})


def check_bits(moved: list[dict[str, Any]], calm: list[dict[str, Any]]) -> None:
    """Both ranks went the same way, and found what they find where nothing moves."""
    assert moved[0]["homes"] == moved[1]["homes"]
    for ours, expected in zip(moved, calm, strict=True):
        assert ours["losses"] == expected["losses"]
        assert all(torch.equal(value, expected["state"][name]) for name, value in ours["state"].items())


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_rank_0_decides_by_the_slowest_and_a_move_for_the_worse_is_taken_back(found: Finder, zero: int) -> None:
    moved, calm = found(f"warmed up, zero {zero}", 2), found(f"calm, zero {zero}", 2)
    check_bits(moved, calm)
    homes = moved[0]["homes"]
    assert homes[0] == homes[1] != homes[2] == homes[3] and homes[4] == homes[0]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_where_one_lacks_room_all_move_and_return_together(found: Finder, zero: int) -> None:
    moved, calm = found(f"shrunk, zero {zero}", 2), found(f"calm, zero {zero}", 2)
    check_bits(moved, calm)
    homes = moved[0]["homes"]
    assert homes[0] != homes[1] and homes[-1] == homes[0]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_a_later_larger_batch_moves_nothing_and_the_refusal_says_what_helps(found: Finder, zero: int) -> None:
    refused, calm = found(f"larger, zero {zero}", 2), found(f"calm, zero {zero}", 2)
    check_bits(refused, calm)
    assert refused[0]["homes"] == calm[0]["homes"]
    assert all("begin with the largest batch" in said for each in refused for said in each["said"] or [""])
