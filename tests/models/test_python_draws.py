"""Random numbers that a capture would freeze are refused, and all others are drawn."""

import random
import threading
from collections.abc import Callable
from typing import Any

import geminifx
import numpy as np
import pytest
import torch
from geminifx.models.python_draws import python_draws_refused
from geminifx.runtime.isa.errors import CaptureError
from torch import Tensor, nn

X = torch.ones(2, 3)


def seeded() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return torch.randn(2, 3)


DRAWS: dict[str, Callable[[], Any]] = {
    "random.random": lambda: random.random(),
    "random.uniform": lambda: random.uniform(0, 1),
    "random.choice": lambda: random.choice([1, 2]),
    "random.seed": lambda: random.seed(2),
    "numpy.random.rand": lambda: float(np.random.rand()),
    "numpy.random.normal": lambda: float(np.random.normal()),
    "numpy.random.permutation": lambda: int(np.random.permutation(3)[0]),
    "torch.manual_seed": seeded,
    "torch.seed": lambda: torch.seed() * 0,
}


class Noisy(nn.Module):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(3, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        noise = self.draw()
        return self.layer(x) + (0 if noise is None else noise)


@pytest.mark.parametrize("name", DRAWS)
def test_a_forward_that_draws_outside_of_the_program_is_refused(name: str) -> None:
    model = geminifx.compile(Noisy(DRAWS[name]), placement="cpu")
    with pytest.raises(CaptureError, match=rf"the forward calls {name}\(\)"):
        model(X)
    DRAWS[name]()  # as ever outside of a capture


def test_torchs_own_draws_are_new_in_every_call() -> None:
    model = geminifx.compile(Noisy(lambda: torch.randn(2, 3)), placement="cpu")
    assert not torch.equal(model(X), model(X))


def test_other_threads_draw_meanwhile() -> None:
    drawn: list[float] = []
    with python_draws_refused():
        other = threading.Thread(target=lambda: drawn.extend([random.random(), float(np.random.rand())]))
        other.start()
        other.join()
        with pytest.raises(CaptureError, match="numpy"):
            np.random.rand()
    assert len(drawn) == 2
