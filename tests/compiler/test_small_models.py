"""What launches and updates on the host take in training steps of small models."""

from dataclasses import replace

import pytest
import torch
from geminifx.compiler import small_models
from geminifx.compiler.rates.presets import preset
from geminifx.compiler.rates.rates import Rates
from geminifx.compiler.small_models import MOST, Shape, corrected_by_steps

CPU, H200 = torch.device("cpu"), preset("h200")
SMALL = Shape(blocks=1, size=16, heads=2, tokens=4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("LAUNCHING", SMALL), ("COMPUTING", (SMALL, SMALL)), ("UPDATING", SMALL), ("STEPS", 7), ("FIRST", 4),
    ):  # fmt: skip
        monkeypatch.setattr(small_models, name, value)


def told(monkeypatch: pytest.MonkeyPatch, step_s: list[float], updating_s: list[float]) -> Rates:
    """Rates corrected by steps that take so long."""
    for name, values in (("step_s", iter(step_s)), ("updating_s", iter(updating_s))):
        monkeypatch.setattr(small_models._Training, name, lambda training, values=values: next(values))
    return corrected_by_steps(H200, CPU)


def test_seconds_of_a_step_are_divided_by_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for blocks in (2, 3, 4):
        monkeypatch.setattr(small_models, "LAUNCHING", Shape(blocks, size=256, heads=4, tokens=128))
        counts.append(1 / told(monkeypatch, [1.0] * 21, [1.0] * 7).launch_s)
    assert counts[2] - counts[1] == pytest.approx(counts[1] - counts[0]), "each block has as many"
    assert counts[1] - counts[0] > 50


def test_seconds_of_updates_are_compared_with_what_is_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    modelled_s = small_models._Training(SMALL, "cpu", CPU).busy_s(small_models.HOST, H200)
    found = told(monkeypatch, [1.0] * 21, [1.3 * modelled_s] * 7)
    for name in ("host_params_per_s", "torch_params_per_s", "passing_bytes_per_s"):
        assert getattr(found, name) == pytest.approx(getattr(H200, name) / 1.3)
    assert found.updates("int8").host_params_per_s == pytest.approx(H200.updates("int8").host_params_per_s / 1.3)
    assert (found.name, found.up_bytes_per_s, found.bf16) == (H200.name, H200.up_bytes_per_s, H200.bf16)
    assert told(monkeypatch, [1.0] * 21, [1e6] * 7).host_params_per_s == H200.host_params_per_s / MOST


def test_products_are_corrected_until_modelled_blocks_take_as_long_as_measured_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What every step takes besides, one second here, is not counted."""
    shapes = [Shape(blocks, size=1024, heads=8, tokens=1024, sequences=4) for blocks in (1, 2)]
    monkeypatch.setattr(small_models, "COMPUTING", shapes)
    models = [small_models._Training(shape, "cuda", CPU) for shape in shapes]
    launches = small_models._Training(SMALL, "cuda", CPU).busy_s(small_models.LAUNCHES, H200) / H200.launch_s
    quick = replace(H200, launch_s=1e-9)
    for factor in (0.8, 1.25):
        slower = quick.with_slower_products(factor)
        steps = [launches * quick.launch_s, *(1.0 + model.modelled(slower).step_s for model in models)]
        found = told(monkeypatch, [step_s for step_s in steps for _ in range(7)], [1.0] * 7)
        for name in ("bf16", "fp16", "fp32"):
            assert getattr(found, name).flops_per_s == pytest.approx(getattr(slower, name).flops_per_s, rel=1e-3)
        assert found.memory_bytes_per_s == H200.memory_bytes_per_s


def test_products_of_which_a_step_tells_nothing_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, [1.0] * 21, [1.0] * 7).bf16 == H200.bf16, "launches of a second each bind it"


def test_the_first_steps_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = (told(monkeypatch, ([s] * 4 + [1.0, 1.0, 3.0]) * 3, [s] * 4 + [1e-5, 1e-5, 3.0]) for s in (1.0, 99.0))
    assert low == high


def test_steps_are_made_and_random_numbers_stay() -> None:
    torch.manual_seed(5)
    found, drawn = corrected_by_steps(H200, CPU), torch.rand(3)
    torch.manual_seed(5)
    assert found.launch_s > 0 and found.host_params_per_s != H200.host_params_per_s
    assert torch.equal(drawn, torch.rand(3))
