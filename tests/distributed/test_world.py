"""A world that nobody described trains as one process does, in the same way on all of its ranks."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launched

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from world_worker import Stack, batches  # noqa: E402

pytestmark = pytest.mark.slow


def found_of(*runs: str, ranks: int, folder: Path) -> dict[str, Any]:
    """What the ranks found, which all share the work alike, and learn what one process does."""
    found = launched(HERE / "world_worker.py", folder / "found.pt", *runs, ranks=ranks)
    assert all(ways == found["ways"][0] for ways in found["ways"])
    losses, state = alone()
    for run in runs:
        torch.testing.assert_close(found[run]["losses"], losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[run]["state"], state, rtol=1e-5, atol=1e-6)
    return found


def alone() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches():
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, dict(model.state_dict())


@pytest.mark.parametrize("ranks", [2, 4])
def test_it_trains_as_one_process_does(ranks: int, tmp_path: Path) -> None:
    found_of("none", "60kB", ranks=ranks, folder=tmp_path)


def test_a_way_that_one_rank_refuses_is_left_by_all(tmp_path: Path) -> None:
    found = found_of("data, refused by one", "pipeline, refused by one", ranks=2, folder=tmp_path)
    for kind in ("data", "pipeline"):
        notes = found[f"{kind}, refused by one"]["notes"]
        assert len(notes) == 1 and notes[0].startswith(f"not taken: {kind} 2") and "no room" in notes[0]
