"""Real processes, among which tensors are sharded in every mode, train as one process does."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from nearness import check  # noqa: E402
from tensor_worker import CASES, DROPPED, LOGITS, Sharded, logits  # noqa: E402
from worker import Trained, train  # noqa: E402

pytestmark = pytest.mark.xdist_group("tensor parallel")  # they share what the processes find
QUICK = (
    "1d x 2, data 2, clipped, within the least", "2d, clipped, on the host, within the least",
    "2.5d of two layers, data 2, zero 3 over both, clipped, on the host", *DROPPED,
)  # fmt: skip
"""What `make test` runs: a mode each, ZeRO, both tiers, and random numbers."""
LAUNCHES = {4: (QUICK, tuple(name for name in (*CASES[4], LOGITS) if name not in QUICK)), 8: (tuple(CASES[8]),)}
Finder = Callable[..., Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Finder:
    """What four ranks, or eight, found of a name."""

    @cache
    def launched(names: tuple[str, ...], ranks: int) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("ranks") / "found.pt"
        done = torchrun(HERE / "tensor_worker.py", str(out), *names, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out)

    def of(name: str, ranks: int = 4) -> Any:
        (names,) = (names for names in LAUNCHES[ranks] if name in names)
        return launched(names, ranks)[name]

    return of


@cache
def one_process(training: str, ranks: int) -> Trained:
    alone: Sharded = CASES[ranks][training].alone()
    return train(alone, alone.rows(0))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES[4]])
def test_four_ranks_train_as_one_process(found: Finder, name: str) -> None:
    check(found(name), one_process(name, 4), CASES[4][name])


def test_random_numbers_are_apart_and_generators_stay_in_step(found: Finder) -> None:
    dropped = found("dropout, recompute none")
    for rank in dropped:
        assert rank["agree"]
        for other in dropped:
            together, alike = rank["place"][0] == other["place"][0], rank["place"] == other["place"]
            assert torch.equal(rank["generator"], other["generator"]) == together
            assert torch.equal(rank["forked"], other["forked"]) == alike


def test_what_is_computed_again_drops_the_same(found: Finder) -> None:
    for kept, again in zip(*map(found, DROPPED), strict=True):
        assert again["losses"] == kept["losses"] and torch.equal(again["generator"], kept["generator"])
        assert all(torch.equal(again["state"][name], value) for name, value in kept["state"].items())


@pytest.mark.slow
def test_logits_that_are_asked_for_come_back_whole(found: Finder) -> None:
    torch.testing.assert_close(found(LOGITS), logits(), rtol=0, atol=2**-18)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES[8])
def test_eight_ranks_train_as_one_process(found: Finder, name: str) -> None:
    check(found(name, 8), one_process(name, 8), CASES[8][name])
