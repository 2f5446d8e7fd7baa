"""Checks of tensors' values that only validate pass while a model is captured; what a model goes by is refused."""

from collections.abc import Callable

import geminifx
import pytest
import torch
from checked_values import (
    PASSING,
    computes_with_what_it_checks,
    decides,
    decides_by_a_number,
    is_caught,
    raises_or_goes_on,
)
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


DECIDING = [decides, decides_by_a_number, computes_with_what_it_checks, is_caught, raises_or_goes_on]


@pytest.mark.parametrize("check", DECIDING)
def test_what_a_model_goes_by_is_refused_with_its_line(check: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"checked_values\.py:\d+ .*depends on the values of tensors"):
        geminifx.compile(Checked(check))(torch.ones(2, 4))


class FromTensor(nn.Module):
    """A shape that is computed, and read in the arguments of a method's call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        shape = torch.ones(2, dtype=torch.int64) * x.shape[0]
        return self.linear(x).clone().view(shape.tolist()).to(x.dtype)


def test_values_that_are_read_in_the_arguments_of_a_call_are_refused_with_the_line() -> None:
    with pytest.raises(CaptureError, match=r"view\(shape.tolist\(\)\).*depends on the values of tensors"):
        geminifx.compile(FromTensor())(torch.ones(4, 4))


def test_distributions_that_check_their_arguments_are_taken_to_pass() -> None:
    def sampled(x: Tensor) -> Tensor:
        return torch.distributions.Normal(x, x.abs() + 1).rsample()

    plain, model, x = Checked(sampled), geminifx.compile(Checked(sampled)), torch.ones(2, 4)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


class Masked(nn.Module):
    """Torch's transformers with a mask that they may take to be causal."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_causal = is_causal
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)
        self.both = nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        if not self.is_causal:
            mask[0, 1] = 0.0
        hidden = self.encoder(x, mask=mask)
        return self.both(hidden, x, tgt_mask=mask).square().mean()


@pytest.mark.parametrize("is_causal", [True, False])
def test_torchs_transformers_take_masks_that_may_be_causal(is_causal: bool) -> None:
    plain, model = Masked(is_causal), geminifx.compile(Masked(is_causal))
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    losses = [each(x) for each in (plain, model)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    expected, found = (dict(each.named_parameters()) for each in (plain, model))
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
