"""Warm-up: the first steps are measured, the plan is decided again by them, and no bit of the training changes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.adaptation.rehoming import Rehoming
from geminifx.compiler.adaptation.step_watch import StepWatch
from geminifx.compiler.options import Options
from geminifx.compiler.planner.correction import MeasuredStep
from geminifx.compiler.rates.presets import preset
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.errors import ArgumentError
from geminifx.runtime.isa.homes import Homes
from optimizing import NET, homes_of, same_moments, same_weights
from torch import Tensor
from torch.optim import AdamW, Optimizer
from zoo import compiled

H100 = preset("h100-sxm")


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[MeasuredStep | None]]:
    """What is told of the windows of steps, one after the other, in place of what was measured; each has been asked for
    when it is gone."""
    told: list[MeasuredStep | None] = []
    measured = StepWatch.measured

    def fake(watch: StepWatch, *about: Any) -> MeasuredStep | None:
        return told.pop(0) if measured(watch, *about) is not None else None

    monkeypatch.setattr(StepWatch, "measured", fake)
    yield told
    assert told == []


def made(**options: Any) -> tuple[geminifx.CompiledModule, Optimizer]:
    given = {"precision": "bf16", "recompute": "none", "rates": H100, **options}
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


def steps_of(step_s: float) -> MeasuredStep:
    return MeasuredStep(step_s, up_s=0.0, down_s=0.0, host_s=0.0, peak_bytes=0)


def check_bits(model: geminifx.CompiledModule, optimizer: Optimizer, losses: list[Tensor]) -> None:
    stays, other = made()
    assert all(map(torch.equal, trained(stays, other, len(losses)), losses))
    assert same_weights(model, stays) and same_moments(optimizer, other)


@pytest.fixture
def others_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the second decision, homes of all kinds make a step half as long."""
    chosen = lambda rehoming, key, limits: replace(rehoming.now[key], homes=mixed(rehoming.now[key]))  # noqa: E731
    step_s = lambda rehoming, key, plans, limits: 1.0 if plans == rehoming.now else 0.5  # noqa: E731
    monkeypatch.setattr(Rehoming, "chosen", chosen)
    monkeypatch.setattr(Rehoming, "step_s", step_s)


def mixed(plan: Plan) -> Homes:
    return homes_of("mixed", plan)


def test_homes_move_where_that_pays_and_training_goes_on(
    measures: list[MeasuredStep | None], others_are_better: None
) -> None:
    measures += [steps_of(0.8), steps_of(0.4)]
    model, optimizer = made(warmup=True)
    before = model.plan.homes
    losses = trained(model, optimizer, 3)
    assert model.plan.homes == before != mixed(model.plan)
    losses += trained(model, optimizer, 1, 3)
    assert model.plan.homes == mixed(model.plan)
    assert "the first steps took 800 ms (the plan expected " in model.plan.notes[-1]
    assert "1 chunk(s) were moved to other homes, for " in model.plan.notes[-1]
    losses += trained(model, optimizer, 4, 4)
    assert model.plan.homes == mixed(model.plan)
    assert (model.stats.planned.step_s, model.stats.measured.step_s) == (model.plan.estimate.step_s, 0.4)
    assert model.plan.estimate.step_s == pytest.approx(0.4, rel=0.02) and "then took 400 ms" in model.plan.notes[-1]
    assert model.plan.estimate.rates.count("corrected by measured steps") == 1
    check_bits(model, optimizer, losses)


def test_the_peak_of_a_step_before_the_move_is_not_that_of_the_steps_after_it(
    monkeypatch: pytest.MonkeyPatch, others_are_better: None
) -> None:
    found: list[MeasuredStep] = []
    measured = StepWatch.measured

    def kept(watch: StepWatch, *about: Any) -> MeasuredStep | None:
        step = measured(watch, *about)
        assert step is not None
        found.append(replace(step, step_s=0.8 / (1 + len(found))))
        return found[-1]

    monkeypatch.setattr(StepWatch, "measured", kept)
    model, optimizer = made(warmup=True)
    trained(model, optimizer, 3)
    tier = model.session.hardware.device_tier
    tier.book("something else", 10**9)
    tier.book("something else", 0)
    trained(model, optimizer, 4, 3)
    before, after = found
    assert before.peak_bytes >= 10**9 > after.peak_bytes > 0


def test_homes_that_are_slower_are_given_up_once(measures: list[MeasuredStep | None], others_are_better: None) -> None:
    measures += [steps_of(0.8), steps_of(0.96)]
    model, optimizer = made(warmup=True)
    before = model.plan.homes
    losses = trained(model, optimizer, 6)
    assert model.plan.homes == mixed(model.plan)
    losses += trained(model, optimizer, 6, 6)
    assert model.plan.homes == before
    assert "steps then took 960 ms, so the chunks were moved back" in model.plan.notes[-1]
    check_bits(model, optimizer, losses)


def test_homes_for_which_there_is_no_room_stay_where_they_are(
    measures: list[MeasuredStep | None], others_are_better: None
) -> None:
    measures += [steps_of(0.8)]
    model, optimizer = made(warmup=True)
    before = model.plan.homes
    model.session.hardware.host_tier.limit_bytes = 1000
    losses = trained(model, optimizer, 6)
    assert model.plan.homes == before
    check_bits(model, optimizer, losses)


def test_a_plan_that_is_the_best_by_what_was_measured_is_kept(measures: list[MeasuredStep | None]) -> None:
    measures += [steps_of(0.8)]
    model, optimizer = made(warmup=True)
    before = model.plan
    trained(model, optimizer, 6)
    assert model.plan.homes == before.homes
    assert model.plan.notes[-1].startswith("the first steps took 800 ms (the plan expected ")
    assert model.plan.estimate.step_s == pytest.approx(0.8, rel=0.02)  # what is expected by now
    assert model.plan.estimate.rates.endswith("corrected by measured steps")


def test_steps_between_which_something_else_ran_are_measured_again(measures: list[MeasuredStep | None]) -> None:
    measures += [steps_of(0.8)]
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


def test_accumulated_steps_are_measured_whole(measures: list[MeasuredStep | None]) -> None:
    measures += [steps_of(0.8)]
    model = compiled(NET, precision="bf16", recompute="none", rates=H100, warmup=1)
    optimizer = model.optimizer(AdamW, lr=1e-2, accumulate=2)
    for step in range(3):
        for part in range(2):
            assert not model.plan.notes
            NET.loss(model, NET.batch(seed=10 * step + part)).backward()
            if (step, part) == (2, 0):
                assert model.plan.notes
                return
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"warmup": True, "placement": "cpu"}])
def test_nobody_measures_unasked(options: dict[str, Any]) -> None:
    """Nor where homes are not the planner's."""
    model, optimizer = made(**options)
    trained(model, optimizer, 5)
    assert not model.plan.notes and model.stats.measured.step_s == 0


def test_a_plan_that_was_given_stays() -> None:
    plan = made()[0].plan
    model = compiled(NET, precision="bf16", plan=plan, warmup=True)
    trained(model, model.optimizer(AdamW, lr=1e-2), 5)
    assert model.plan.homes == plan.homes and not model.plan.notes


def test_what_is_measured_is_what_happens() -> None:
    model, optimizer = made(warmup=True, device_budget=None, placement="auto")
    trained(model, optimizer, 5)
    figures = model.stats.measured
    assert 0 < figures.peak_bytes <= model.plan.peak_bytes
    assert figures.step_s > 0


@pytest.mark.parametrize(("given", "steps"), [(True, 2), (False, 0), (1, 1), (3, 3)])
def test_how_many_steps_are_measured(given: Any, steps: int) -> None:
    assert Options.of({"warmup": given}).warmup_steps == steps


@pytest.mark.parametrize("given", [-1, 1.5, "auto"])
def test_anything_else_is_no_number_of_steps(given: Any) -> None:
    with pytest.raises(ArgumentError, match="warmup="):
        Options.of({"warmup": given})
