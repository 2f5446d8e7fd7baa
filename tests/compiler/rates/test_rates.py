"""Rates: what a product takes by its size, what makes no sense, and whom several machines wait for."""

from dataclasses import replace

import pytest
import torch
from geminifx.compiler.rates.presets import preset
from geminifx.compiler.rates.rates import ARENA, Products, Slowdown, Updates, slowest

SIZES = Products((1e8, 1e10), (1e12, 3e12))


@pytest.mark.parametrize(
    "flop, seconds",
    [(1e8, 1e-4), (1e10, 1e10 / 3e12), (1e9, 1e9 / 2e12), (1e6, 1e-6), (1e13, 1e13 / 3e12), (0, 0.0)],
    ids=["the smallest", "the largest", "half way", "below", "above", "none"],
)
def test_the_rate_of_a_product_goes_with_the_logarithm_of_its_size(flop: float, seconds: float) -> None:
    assert SIZES.seconds(flop) == pytest.approx(seconds)


def test_products_of_a_dtype_that_has_no_rate_take_float32_s() -> None:
    rates = preset("rtx2060")
    assert rates.products(torch.float16) is rates.fp16 and rates.products(torch.bfloat16) is rates.bf16
    assert rates.products(torch.float64) is rates.products(torch.float32) is rates.fp32


def test_updates_of_narrow_moments_go_by_their_bytes_until_they_are_measured() -> None:
    rates = replace(preset("h200"), host_params_per_s=1e9, device_params_per_s=1e11, bf16_moments=None)
    assert rates.updates("exact") == Updates(1e9, 1e11)
    assert rates.updates("bf16") == Updates(1e9 * (26 / 18), 1e11 * (26 / 18))
    measured = replace(rates, bf16_moments=Updates(3e9, 4e11))
    assert measured.updates("bf16") == Updates(3e9, 4e11)
    assert measured.slowed(Slowdown(compute=4, host=3)).updates("bf16") == Updates(1e9, 1e11)
    with pytest.raises(ValueError, match="expected a number above 0"):
        Updates(0.0, 1.0)


def test_an_exchange_takes_its_latency_and_its_bytes() -> None:
    rates = replace(ARENA, network_bytes_per_s=1e9, network_latency_s=2e-6)
    assert rates.exchange_s(3, 5000) == pytest.approx(6e-6 + 5e-6)


@pytest.mark.parametrize(
    "flop, flops_per_s, says",
    [((), (), "increasing sizes"), ((2.0, 1.0), (1.0, 1.0), "increasing"), ((1.0,), (1.0, 2.0), "one rate"),
     ((1.0,), (0.0,), "0.0; expected a number above 0"), ((1.0,), (float("nan"),), "nan")],
)  # fmt: skip
def test_products_that_make_no_sense_are_refused(
    flop: tuple[float, ...], flops_per_s: tuple[float, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Products(flop, flops_per_s)


@pytest.mark.parametrize(
    "changes, says",
    [({"up_bytes_per_s": -1.0}, "up_bytes_per_s: -1.0; expected a number above 0"),
     ({"kernel_s": -1e-6}, "kernel_s is -1e-06; expected seconds, 0 or more"),
     ({"launch_s": float("nan")}, "launch_s is nan")],
)  # fmt: skip
def test_rates_that_make_no_sense_are_refused(changes: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(ARENA, **changes)


def test_several_machines_wait_for_the_slowest() -> None:
    fast, slow = preset("h200"), preset("rtx3090")
    assert slowest([fast, slow, fast]) is slow
    behind_a_bridge = replace(fast, both_bytes_per_s=fast.both_bytes_per_s / 2)
    assert slowest([fast, behind_a_bridge]) is behind_a_bridge
