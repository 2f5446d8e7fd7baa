"""Real processes, among which tensors are sharded in every mode, train as one process does."""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finder, ranks_of

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from changing_numbers import losses, seeded  # noqa: E402
from nearness import check  # noqa: E402
from tensor_worker import CASES, DROPPED, LOGITS, Sharded, logits  # noqa: E402
from worker import Trained, train  # noqa: E402

pytestmark = pytest.mark.xdist_group("tensor parallel")  # they share what the processes find
SLOW, WHOLE = pytest.mark.slow, pytest.mark.campaign(whole=True)

EIGHT = (
    "data 8, zero 3, on the host, within the least", "1d x 8, sequence, on the host, within the least", "2d, data 2",
    "2.5d, zero 1, in the backward", "3d, zero 2, clipped, on the host, within the least",
)  # fmt: skip
"""What `make test-all` runs on eight ranks; `make campaigns` runs the others."""
LAUNCHES = {
    4: ((*CASES[4], *DROPPED, LOGITS),),
    8: (EIGHT, tuple(name for name in CASES[8] if name not in EIGHT)),
}
Finder = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Finder:
    return finder(HERE / "tensor_worker.py", tmp_path_factory.mktemp("ranks"), LAUNCHES)


@cache
def one_process(training: str, ranks: int) -> Trained:
    alone: Sharded = CASES[ranks][training].alone()
    return train(alone, alone.rows(0))


@SLOW
@pytest.mark.parametrize("name", CASES[4])
def test_four_ranks_train_as_one_process(found: Finder, name: str) -> None:
    check(found(name, 4), one_process(name, 4), CASES[4][name])


@SLOW
@pytest.mark.parametrize("where", ["", " in stages"])
def test_random_numbers_are_apart_and_generators_stay_in_step(found: Finder, where: str) -> None:
    dropped = found(f"dropout{where}, recompute none", 4)
    for rank in dropped:
        assert rank["agree"]
        for other in dropped:
            together, alike = rank["place"][0] == other["place"][0], rank["place"] == other["place"]
            assert torch.equal(rank["generator"], other["generator"]) == together
            assert torch.equal(rank["forked"], other["forked"]) == alike


@SLOW
@pytest.mark.parametrize("where", ["", " in stages"])
def test_what_is_computed_again_drops_the_same(found: Finder, where: str) -> None:
    ways = (found(f"dropout{where}, recompute {recompute}", 4) for recompute in ("none", "all"))
    for kept, again in zip(*ways, strict=True):
        assert again["losses"] == kept["losses"] and torch.equal(again["generator"], kept["generator"])
        assert all(torch.equal(again["state"][name], value) for name, value in kept["state"].items())


@SLOW
def test_logits_that_are_asked_for_come_back_whole(found: Finder) -> None:
    torch.testing.assert_close(found(LOGITS, 4), logits(), rtol=0, atol=2**-18)


@SLOW
def test_a_number_that_changes_is_the_same_on_all_ranks() -> None:
    expected = losses(seeded())
    for code, output in ranks_of(HERE / "changing_numbers.py", ranks=2):
        assert code == 0, output
        rank = json.loads(output)
        assert rank["losses"] == pytest.approx(expected, rel=1e-5) and rank["captures"] == 2
        assert "float32[4, 8], [1] 0.5; " in rank["said"] and "float32[4, 8], [1] 1.5; " in rank["said"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW if n in EIGHT else WHOLE) for n in CASES[8]])
def test_eight_ranks_train_as_one_process(found: Finder, name: str) -> None:
    check(found(name, 8), one_process(name, 8), CASES[8][name])
