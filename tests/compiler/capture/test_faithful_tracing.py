"""Under one seed a compiled model draws what the plain one draws: in place, in any layout, also when it recomputes.
What it could not draw, or check, is refused (test_refusals.py)."""

import copy
from collections.abc import Callable
from typing import Any

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa.errors import CaptureError
from shared_captures import shared_captures
from torch import Tensor, nn


def written(draw: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Multiplies by what `draw` writes to a tensor that is laid out in the same way."""

    def forward(y: Tensor) -> Tensor:
        noise = torch.zeros_like(y)
        draw(noise)
        return y * noise

    return forward


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda y: F.dropout(y, 0.5),
    "dropout in place": lambda y: F.dropout(y, 0.5, inplace=True),
    "alpha_dropout": lambda y: F.alpha_dropout(y, 0.5, True),
    "feature_alpha_dropout": lambda y: F.feature_alpha_dropout(y, 0.5, True),
    "dropout1d": lambda y: F.dropout1d(y, 0.5),
    "rrelu": lambda y: F.rrelu(y, training=True),
    "gumbel_softmax": F.gumbel_softmax,
    "bernoulli": lambda y: y * torch.bernoulli(torch.empty_like(y), 0.5),
    "bernoulli of probabilities": lambda y: y * torch.bernoulli(y.detach().sigmoid()),
    "rand_like": lambda y: y * torch.rand_like(y),
    "randn_like": lambda y: y * torch.randn_like(y),
    "randint_like": lambda y: y * torch.randint_like(y, 5),
    "poisson": lambda y: y * torch.poisson(y.detach().abs()),
    "normal": lambda y: y * torch.normal(y.detach(), y.detach().abs()),
    "bernoulli_": written(lambda noise: noise.bernoulli_()),
    "bernoulli_ of a number": written(lambda noise: noise.bernoulli_(0.7)),
    "bernoulli_ of probabilities": written(lambda noise: noise.bernoulli_(torch.full_like(noise, 0.3))),
    "bernoulli_ of a part": written(lambda noise: noise[:, ::2].bernoulli_(0.5)),
    "uniform_": written(lambda noise: noise.uniform_(-1, 1)),
    "normal_": written(lambda noise: noise.normal_()),
    "normal_ of a part": written(lambda noise: noise[1:].normal_()),
    "exponential_": written(lambda noise: noise.exponential_()),
    "geometric_": written(lambda noise: noise.geometric_(0.4)),
    "random_": written(lambda noise: noise.random_(7)),
    "random_ from": written(lambda noise: noise.random_(-3, 7)),
}


class Draws(nn.Module):
    """Draws for a contiguous tensor and for a transposed one, within a block that can be recomputed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(DRAWS[self.name](block(x)))
            x = torch.tanh(DRAWS[self.name](block(x).transpose(0, 1))).transpose(0, 1)
        return x


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_plain_pytorchs(name: str, recompute: Any) -> None:
    torch.manual_seed(0)
    plain, x = Draws(name), torch.randn(3, 5, 4)
    with shared_captures():
        model = geminifx.compile(copy.deepcopy(plain), recompute=recompute, example_inputs=(x,))
    for seed in range(2):
        found = []
        for each in (model, plain):
            torch.manual_seed(seed)
            found.append(each(x))
            each.zero_grad()
            found[-1].square().sum().backward()
            found.append(torch.get_rng_state())
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_draw_without_an_end_is_refused() -> None:
    class Endless(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.empty_like(x).random_(3, None)

    with pytest.raises(CaptureError, match="pass both ends of the range"):
        geminifx.compile(Endless(4, 4), example_inputs=(torch.ones(2, 4),))
