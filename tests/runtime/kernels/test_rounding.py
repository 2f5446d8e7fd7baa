"""Stochastic rounding: right in the mean, what bfloat16 has stays as it is, and chance that goes by elements alone."""

import pytest
import torch
from geminifx.runtime.kernels.rounding import Draws, chance, key_of, rounded
from updates import SPECIAL, any_bits, floats, same

CPU = torch.device("cpu")
MANY = 2**20


@pytest.mark.parametrize("value", [1 + 2.0**-11, -1 - 2.0**-9 * 0.9, 3e-39, -(2.0**-126) * (1 + 2.0**-15)])
def test_a_value_is_kept_in_the_mean(value: float) -> None:
    values = torch.full((MANY,), value)
    found = rounded(values, Draws(key_of(0, 1, "weight"))).double()
    low, high = found.min().item(), found.max().item()
    assert low < value < high and set(found.unique().tolist()) == {low, high}
    # Five standard deviations of the mean of so many draws between two neighbours, half of their distance at most.
    assert abs(found.mean().item() - values[0].item()) < 5 * 0.5 * (high - low) / MANY**0.5


def test_what_bfloat16_has_stays_as_it_is_and_no_nan_becomes_a_number() -> None:
    values = torch.cat([floats(list(SPECIAL)), any_bits(100_000, 1)])
    exact = values.bfloat16().float()
    assert same(rounded(exact, Draws(key_of(0, 1, "weight"))).float(), exact)
    assert torch.equal(rounded(values, Draws(5)).isnan(), values.isnan())


def test_chance_goes_by_seed_step_name_and_element() -> None:
    draws = Draws(key_of(3, 7, "layer.weight"))
    whole = chance(draws, 1000, CPU)
    assert torch.equal(chance(draws.behind(400), 600, CPU), whole[400:]), "wherever a range begins"
    others = (key_of(4, 7, "layer.weight"), key_of(3, 8, "layer.weight"), key_of(3, 7, "layer.bias"))
    for key in others:
        assert (chance(Draws(key), 1000, CPU) == whole).sum() < 10
    assert key_of(3, 7, "layer.weight") == draws.key == 0xE265ED1A4630F82E
