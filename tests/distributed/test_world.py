"""A world that nobody described trains as one process does, in the same way on all of its ranks."""

import sys
from pathlib import Path

import pytest
import torch
from launching import launched

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from world_worker import Stack, batches  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [2, 4])
def test_it_trains_as_one_process_does(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = launched(
        HERE / "world_worker.py", tmp_path_factory.mktemp("world") / "found.pt", "none", "60kB", ranks=ranks
    )
    assert all(ways == found["ways"][0] for ways in found["ways"])
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches():
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    for budget in ("none", "60kB"):
        torch.testing.assert_close(found[budget]["losses"], losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[budget]["state"], dict(model.state_dict()), rtol=1e-5, atol=1e-6)
