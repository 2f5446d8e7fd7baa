"""Generator states that processes have for themselves: apart by coordinates, and all go on alike."""

import pytest
import torch
from geminifx.runtime.kernels.random_state import fork, generator_of
from torch import Tensor

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)]


def drawn(state: Tensor, device: torch.device) -> Tensor:
    own = torch.Generator(device)
    own.set_state(state)
    return torch.rand(8, generator=own, device=device)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_each_place_draws_its_own_numbers(device: torch.device) -> None:
    found = {}
    for coordinates in ((0,), (1,), (0, 1), (1, 0)):
        torch.manual_seed(5)
        found[coordinates] = drawn(fork(device, coordinates), device)
    assert len({tuple(values.tolist()) for values in found.values()}) == len(found)
    torch.manual_seed(5)
    assert torch.equal(drawn(fork(device, (1,)), device), found[1,]), "the same place draws the same"


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_device_s_generator_moves_on_alike_everywhere(device: torch.device) -> None:
    left, forks = [], []
    for place in range(2):
        torch.manual_seed(5)
        forks += [drawn(fork(device, (place,)), device) for _ in range(2)]
        left.append(generator_of(device).get_state())
    assert torch.equal(*left)
    assert len({tuple(values.tolist()) for values in forks}) == 4, "one fork is not the one before"
