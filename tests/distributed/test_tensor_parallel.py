"""Real processes, among which tensors are sharded in every mode, train as one process does."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from nearness import check  # noqa: E402
from tensor_worker import CASES, Sharded, logits  # noqa: E402
from worker import Trained, train  # noqa: E402

FOUR, EIGHT = (pytest.mark.xdist_group(f"tensor parallel by {ranks}") for ranks in ("four", "eight"))


def found_by(ranks: int, folder: Path) -> dict[str, Any]:
    out = folder / "found.pt"
    done = torchrun(HERE / "tensor_worker.py", str(out), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def by_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by(4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def by_eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by(8, tmp_path_factory.mktemp("eight"))


@cache
def one_process(training: str, ranks: int) -> Trained:
    alone: Sharded = CASES[ranks][training].alone()
    return train(alone, alone.rows(0))


@FOUR
@pytest.mark.parametrize("name", CASES[4])
def test_four_ranks_train_as_one_process(by_four: dict[str, Any], name: str) -> None:
    check(by_four[name], one_process(name, 4), CASES[4][name])


@FOUR
def test_random_numbers_are_apart_and_generators_stay_in_step(by_four: dict[str, Any]) -> None:
    dropped = by_four["dropout, recompute none"]
    for rank in dropped:
        assert rank["agree"]
        for other in dropped:
            together, alike = rank["place"][0] == other["place"][0], rank["place"] == other["place"]
            assert torch.equal(rank["generator"], other["generator"]) == together
            assert torch.equal(rank["forked"], other["forked"]) == alike


@FOUR
def test_what_is_computed_again_drops_the_same(by_four: dict[str, Any]) -> None:
    for kept, again in zip(by_four["dropout, recompute none"], by_four["dropout, recompute all"], strict=True):
        assert again["losses"] == kept["losses"] and torch.equal(again["generator"], kept["generator"])
        assert all(torch.equal(again["state"][name], value) for name, value in kept["state"].items())


@FOUR
def test_logits_that_are_asked_for_come_back_whole(by_four: dict[str, Any]) -> None:
    torch.testing.assert_close(by_four["logits"], logits(), rtol=0, atol=2**-18)


@EIGHT
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES[8])
def test_eight_ranks_train_as_one_process(by_eight: dict[str, Any], name: str) -> None:
    check(by_eight[name], one_process(name, 8), CASES[8][name])
