"""Warm-up: the first steps are measured, the plan is decided again by them, and no bit of the training changes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler import warm_up
from geminifx.compiler.options import Options
from geminifx.compiler.planner.correction import Measured
from geminifx.compiler.rates.presets import preset
from geminifx.compiler.step_watch import StepWatch
from geminifx.runtime.isa.errors import ArgumentError
from geminifx.runtime.isa.homes import Where
from optimizing import NET, same_moments, same_weights
from torch import Tensor
from torch.optim import AdamW, Optimizer
from zoo import compiled

QUICK_HOST = replace(preset("h100-sxm"), host_params_per_s=1e15)
"""The host updates in no time, and nothing travels to be updated on the device."""

BUDGET = 48_000
"""Of the training state one chunk of two fits, beside the other's weights."""


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Measured | None]]:
    """What is told of the windows of steps, one after the other, in place of what was measured; each has been asked for
    when it is gone."""
    told: list[Measured | None] = []
    measured = StepWatch.measured

    def fake(watch: StepWatch, *about: Any) -> Measured | None:
        return told.pop(0) if measured(watch, *about) is not None else None

    monkeypatch.setattr(StepWatch, "measured", fake)
    yield told
    assert told == []


def made(**options: Any) -> tuple[geminifx.CompiledModule, Optimizer]:
    given = {"precision": "bf16", "recompute": "none", "device_budget": BUDGET, "rates": QUICK_HOST, **options}
    model = compiled(NET, **given)
    return model, model.optimizer(AdamW, lr=1e-2)


def trained(model: geminifx.CompiledModule, optimizer: Optimizer, steps: int, first: int = 0) -> list[Tensor]:
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = NET.loss(model, NET.batch(seed=step))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses


def slow_host(times: float = 1.0) -> Measured:
    """Steps in which the host was slow: most of their seconds."""
    return Measured(step_s=0.8 * times, up_s=0.0, down_s=0.0, host_s=0.7, peak_bytes=0)


def where(model: geminifx.CompiledModule) -> list[Where]:
    return [home.where for home in model.plan.homes]


def check_bits(model: geminifx.CompiledModule, optimizer: Optimizer, losses: list[Tensor]) -> None:
    stays, other = made()
    assert all(map(torch.equal, trained(stays, other, len(losses)), losses))
    assert same_weights(model, stays) and same_moments(optimizer, other)


@pytest.fixture
def slow_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan that is decided by the slow host updates on the device what it holds."""
    correct = warm_up.corrected

    def corrected(limits: Any, *about: Any) -> Any:
        found = correct(limits, *about)
        return replace(found, rates=replace(found.rates, host_params_per_s=1e3))

    monkeypatch.setattr(warm_up, "corrected", corrected)


def test_homes_move_where_that_pays_and_training_goes_on(measures: list[Measured | None], slow_streams: None) -> None:
    measures += [slow_host(), slow_host(0.5)]
    model, optimizer = made(warmup=True)
    before = where(model)
    losses = trained(model, optimizer, 3)
    assert where(model) == before
    losses += trained(model, optimizer, 1, 3)
    after = where(model)
    assert before.count(Where.HOST) > after.count(Where.HOST) and Where.STREAMED in after
    losses += trained(model, optimizer, 4, 4)
    assert where(model) == after
    assert "the first steps took 800 ms" in model.plan.notes[-1] and "have other homes since" in model.plan.notes[-1]
    assert model.stats.planned.step_s == model.plan.estimate.step_s
    assert model.stats.measured.step_s == 0.4
    assert model.stats.device_peak_bytes <= model.plan.peak_bytes <= BUDGET
    check_bits(model, optimizer, losses)


def test_homes_that_are_slower_are_given_up_once(measures: list[Measured | None], slow_streams: None) -> None:
    measures += [slow_host(), slow_host(1.2)]
    model, optimizer = made(warmup=True)
    before = model.plan.homes
    losses = trained(model, optimizer, 4)
    assert model.plan.homes != before
    losses += trained(model, optimizer, 5, 4)
    assert model.plan.homes == before
    assert "they took 960 ms, and chunks went back" in model.plan.notes[-1]
    check_bits(model, optimizer, losses)


def test_homes_stay_where_others_gain_little(measures: list[Measured | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "GAIN", 1.0)
    measures += [slow_host()]
    model, optimizer = made(warmup=True)
    before = model.plan
    trained(model, optimizer, 6)
    assert model.plan.homes == before.homes
    assert model.plan.notes[-1].startswith("the first steps took 800 ms, where ")
    assert model.plan.estimate.step_s == pytest.approx(0.8, rel=0.02)  # what is expected by now
    assert model.plan.estimate.rates.endswith("corrected by steps that were measured")


def test_steps_between_which_something_else_ran_are_measured_again(measures: list[Measured | None]) -> None:
    measures += [slow_host()]
    model, optimizer = made(warmup=True)
    trained(model, optimizer, 2)
    model.eval()
    with torch.no_grad():
        model(NET.batch()["input"])
    model.train()
    trained(model, optimizer, 2, 2)
    assert not model.plan.notes
    trained(model, optimizer, 3, 4)
    assert model.plan.notes


def test_accumulated_steps_are_measured_whole(measures: list[Measured | None]) -> None:
    measures += [slow_host()]
    model = compiled(NET, precision="bf16", recompute="none", device_budget=BUDGET, rates=QUICK_HOST, warmup=1)
    optimizer = model.optimizer(AdamW, lr=1e-2, accumulate=2)
    for step in range(3):
        for part in range(2):
            assert not model.plan.notes
            NET.loss(model, NET.batch(seed=10 * step + part)).backward()
            if (step, part) == (2, 0):
                assert model.plan.notes
                return
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"warmup": False}, {"warmup": True, "placement": "cpu"}])
def test_nobody_measures_unasked(options: dict[str, Any]) -> None:
    """In the arena in RAM, whose sides are one memory, and where homes are not the planner's."""
    model, optimizer = made(**options)
    trained(model, optimizer, 5)
    assert not model.plan.notes and model.stats.measured.step_s == 0


def test_a_plan_that_was_given_stays() -> None:
    plan = made()[0].plan
    model = compiled(NET, precision="bf16", plan=plan, warmup=True, device_budget=BUDGET)
    trained(model, model.optimizer(AdamW, lr=1e-2), 5)
    assert model.plan.homes == plan.homes and not model.plan.notes


def test_what_is_measured_is_what_happens() -> None:
    model, optimizer = made(warmup=True, device_budget=None, placement="auto")
    trained(model, optimizer, 5)
    figures = model.stats.measured
    assert 0 < figures.peak_bytes <= model.plan.peak_bytes
    assert figures.step_s > 0


@pytest.mark.parametrize(("given", "on_cuda", "steps"), [
    ("auto", True, 2), ("auto", False, 0), (True, False, 2), (False, True, 0), (3, False, 3),
])  # fmt: skip
def test_how_many_steps_are_measured(given: Any, on_cuda: bool, steps: int) -> None:
    assert Options.of({"warmup": given}).warmup_steps(on_cuda) == steps


@pytest.mark.parametrize("given", [-1, 1.5, "yes"])
def test_anything_else_is_no_number_of_steps(given: Any) -> None:
    with pytest.raises(ArgumentError, match="warmup="):
        Options.of({"warmup": given})
