"""Presets: by the name that the driver gives a card, and in the order that the cards themselves are in."""

from typing import get_args

import pytest
from geminifx.compiler.rates.presets import CARDS, CORE_PARAMS_PER_S, card_named, preset
from geminifx.runtime.isa.moments import Moments


@pytest.mark.parametrize(
    "gpu, name",
    [
        ("NVIDIA GeForce RTX 2060", "rtx2060"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-PCIE-16GB", "v100"),
        ("Tesla V100-SXM2-32GB", "v100-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_cards_are_known_by_what_the_driver_calls_them(gpu: str, name: str) -> None:
    assert card_named(gpu) == name


@pytest.mark.parametrize(
    "gpu",
    ["NVIDIA A10", "NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 2060 SUPER",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H200 NVL",
     "NVIDIA GH200 480GB", "NVIDIA H100 NVL", "Quadro RTX 6000", ""],
)  # fmt: skip
def test_another_card_is_not_taken_for_one_of_them(gpu: str) -> None:
    assert card_named(gpu) is None


@pytest.mark.parametrize("name", CARDS)
def test_nothing_is_faster_than_what_is_published(name: str) -> None:
    card, rates = CARDS[name], preset(name)
    assert max(rates.bf16.flops_per_s) < card.bf16 and max(rates.fp16.flops_per_s) < card.fp16
    assert rates.memory_bytes_per_s < card.memory_bytes_per_s and rates.both_bytes_per_s < rates.up_bytes_per_s
    assert rates.name == f"the preset {name}" and rates.overlaps


def test_what_was_measured_of_large_servers_is_what_their_presets_say() -> None:
    """Copies both ways 28 to 40 GB/s, 5e9 parameters updated on the host, 264e9 bytes passing."""
    for name in ("h100-sxm", "h200"):
        rates = preset(name)
        assert 28e9 < rates.both_bytes_per_s < 40e9
        assert rates.host_params_per_s == pytest.approx(5e9, rel=0.1)
        assert rates.passing_bytes_per_s == pytest.approx(264e9, rel=0.05)
        assert rates.device_params_per_s > 100e9


@pytest.mark.parametrize("name", CARDS)
def test_updates_of_narrow_moments_take_less_time_but_no_more_than_cores_do(name: str) -> None:
    rates = preset(name)
    exact, bf16, int8 = (rates.updates(moments) for moments in get_args(Moments))
    assert exact.host_params_per_s <= bf16.host_params_per_s <= int8.host_params_per_s
    assert int8.host_params_per_s <= CARDS[name].host.cores * CORE_PARAMS_PER_S["int8"]
    assert exact.device_params_per_s < bf16.device_params_per_s < int8.device_params_per_s


def test_a_newer_card_is_faster() -> None:
    order = [preset(name).bf16.flops_per_s[-1] for name in ("rtx2060", "rtx3090", "rtx4090", "a100-sxm", "h100-sxm")]
    assert order == sorted(order) and len(set(order)) == len(order)
    assert preset("h200").memory_bytes_per_s > preset("h100-sxm").memory_bytes_per_s > preset("h100").memory_bytes_per_s
