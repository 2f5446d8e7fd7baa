"""The largest batch that fits, against what compiling for such batches says."""

from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import BudgetError, StateError
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("shared")

BUDGET = 60_000


class Net(nn.Module):
    """Two layers and a loss, whose activations are most of what they take."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.layers(x), target)


def compiled(examples: int, **options: Any) -> Any:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(examples, 16), "target": torch.randn(examples, 16)}
    defaults = {"device_budget": BUDGET, "device": "cpu", "placement": "cpu", "microbatches": 1}
    return geminifx.compile(Net(), example_inputs=inputs, **{**defaults, **options})


def fits(examples: int, **options: Any) -> bool:
    try:
        compiled(examples, **options)
    except BudgetError:
        return False
    return True


@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_largest_batch_fits_and_the_next_larger_one_does_not(microbatches: int) -> None:
    model = compiled(3, microbatches=microbatches)
    before = model.plan
    found = model.largest_batch()
    doubled = 3 * 2 ** ((found // 3).bit_length() - 1)
    step = max(doubled // 8 // microbatches, 1) * microbatches
    assert found > 8 and found % microbatches == 0
    assert fits(found, microbatches=microbatches) and not fits(found + step, microbatches=microbatches)
    assert model.plan == before and model.session.last["training"].captured.examples == 3, "nothing has changed"


def test_with_an_optimizer_of_the_models_own_its_states_count() -> None:
    model = compiled(4, placement="cuda")
    before = model.largest_batch()
    model.optimizer(torch.optim.SGD, lr=0.1)
    assert model.largest_batch() > before, "it keeps fewer than is planned for any of torch's"
    model(x=torch.randn(4, 16), target=torch.randn(4, 16)).backward()
    assert model.largest_batch() > before


def test_where_nothing_bounds_a_batch_that_is_said() -> None:
    with pytest.raises(StateError, match="there is no device budget, so any batch fits"):
        compiled(4, device_budget=None).largest_batch()


def test_without_a_training_step_that_is_said() -> None:
    model = geminifx.compile(Net(), device_budget=BUDGET, device="cpu")
    with pytest.raises(StateError):
        model.largest_batch()
    with torch.no_grad():
        model(x=torch.randn(4, 16), target=torch.randn(4, 16))
    with pytest.raises(StateError, match="no training step is known yet"):
        model.largest_batch()
