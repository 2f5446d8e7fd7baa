"""Parameters that are thawed during training, on several processes."""

import sys
from pathlib import Path

import pytest
import torch
from launching import ranks_of

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import thawing  # noqa: E402


@pytest.mark.parametrize("way", thawing.WAYS)
def test_thawed_parameters_are_trained_on_all_ranks_as_on_one(way: str, tmp_path: Path) -> None:
    found = ranks_of(HERE / "thawing.py", way, str(tmp_path), ranks=thawing.RANKS)
    assert [code for code, _ in found] == [0, 0], found
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(thawing.RANKS)]
    # Sums over processes are taken in another order. Gradients of bfloat16 compute have 8 bits, which may turn the sign
    # of the smallest: AdamW then goes the other way, by up to its learning rate in each of four steps.
    most = 4 * 2 * thawing.HYPER["lr"]
    close = {"rtol": 0.0, "atol": most} if "bf16" in way else {"rtol": 1e-4, "atol": 1e-5}
    means = torch.tensor([one["losses"] for one in ranks]).mean(0)
    torch.testing.assert_close(means, torch.tensor(ranks[0]["expected"]), **close)
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name]), name
        torch.testing.assert_close(value, ranks[0]["plain"][name], **close)


@pytest.mark.parametrize("way, budget_bytes", [("pipeline", 100_000), ("data", 420_000)])
def test_a_thaw_for_which_one_rank_has_no_room_changes_none(way: str, budget_bytes: int, tmp_path: Path) -> None:
    found = ranks_of(HERE / "thawing.py", way, str(tmp_path), str(budget_bytes), ranks=thawing.RANKS)
    assert [code for code, _ in found] == [0, 0], found
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(thawing.RANKS)]
    assert all("too small" in one["told"] for one in ranks)
    assert sum("ranks" in one["told"] or "rank " in one["told"] for one in ranks) < thawing.RANKS, "one rank's own"
    assert all(one["same"] and one["trained"] <= 1 for one in ranks)
