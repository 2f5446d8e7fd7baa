"""The benchmark of a second process: what it asks of the other one, and what it finds; here a tier that shrinks."""

from pathlib import Path
from typing import Any

import pytest
import second_process
import torch
from random_models import config_of
from systems.ours import Ours
from task import Task

STEPS = (2, 2, 20)


class Tier:
    """In place of another process."""

    def __init__(self, contestant: Ours) -> None:
        self.tier = contestant.model.session.hardware.device_tier
        self.asked = self.tier.limit_bytes

    def leave(self, count_bytes: int) -> int:
        self.tier.limit_bytes = count_bytes
        return 1

    def free(self) -> int:
        self.tier.limit_bytes = self.asked
        return 0


def found(contestant: Ours, second: Any) -> list[dict[str, Any]]:
    return second_process.trained(contestant, STEPS, contestant.model.plan.peak_bytes // 5, second)


def test_the_plan_shrinks_and_grows_back_with_the_same_losses(tmp_path: Path) -> None:
    config = config_of("llama-mini")
    config.update({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256})
    config.save_pretrained(tmp_path)
    model = str(tmp_path / "config.json")
    task = Task(model, 2, 32, budget=str(Ours(Task(model, 2, 32)).model.plan.peak_bytes))
    calm, ours = found(Ours(task), None), Ours(task)
    pressed = found(ours, Tier(ours))
    told = second_process.compared(calm, pressed, STEPS)
    assert told["the same losses"] and told["it shrank"] and told["it grew back"]
    assert [one["theirs_bytes"] for one in pressed] == [0, 0, 1, 1, *[0] * 20]
    assert not second_process.compared(calm, calm, STEPS)["it shrank"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with a GPU it would fill that")
def test_without_a_gpu_it_says_that_it_needs_one() -> None:
    with pytest.raises(SystemExit, match="with one"):
        second_process.main([])
