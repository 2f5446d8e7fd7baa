"""Ranks that share out weights keep the same ones on the device, whatever room their own batches leave."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import ranks_of

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from residency import RATE, ROWS, inputs, network  # noqa: E402


def one_process() -> tuple[list[list[float]], float]:
    """The losses of each rank's batches, and that of the trained model."""
    model, losses = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(len(ROWS)):
        both = [model(inputs(step, rank)).square().mean() for rank in range(2)]
        (sum(both) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in both])
    return [list(rank) for rank in zip(*losses, strict=True)], model(torch.ones(3, 32)).square().mean().item()


@pytest.mark.slow
def test_ranks_with_batches_of_other_shapes_keep_the_same_weights() -> None:
    expected, evaluated = one_process()
    ended = ranks_of(HERE / "residency.py", ranks=2)
    found = [json.loads(output) for _, output in ended]
    for rank, losses in zip(found, expected, strict=True):
        assert rank["losses"] == pytest.approx(losses, rel=1e-5)
        assert rank["evaluated"] == pytest.approx(evaluated, rel=1e-5)
        assert all(stay == rank["stay"][0] for stay in rank["stay"]) and rank["stay"] == found[0]["stay"]
        assert (
            "All ranks keep the plan of their first training step, and this batch does not fit it: begin with"
            in rank["said"]
        )
