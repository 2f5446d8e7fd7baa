"""Checks of tensors' values that only validate pass while a model is captured; what a model goes by is refused."""

from collections.abc import Callable

import geminifx
import pytest
import torch
from checked_values import PASSING, decides, is_caught, raises_or_goes_on
from geminifx.runtime.isa.errors import CaptureError
from torch import Tensor, nn


class Checked(nn.Module):
    def __init__(self, check: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.check = nn.Linear(4, 4), check

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.check(x))


@pytest.mark.parametrize("check", PASSING)
def test_a_check_that_only_raises_is_taken_to_pass(check: str) -> None:
    plain, model, x = Checked(PASSING[check]), geminifx.compile(Checked(PASSING[check])), torch.ones(2, 4)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("check", [decides, is_caught, raises_or_goes_on])
def test_what_a_model_goes_by_is_refused_with_its_line(check: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"checked_values\.py:\d+ .*depends on the values of tensors"):
        geminifx.compile(Checked(check))(torch.ones(2, 4))
