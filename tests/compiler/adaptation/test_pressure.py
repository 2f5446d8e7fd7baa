"""Pressure: the device has less memory than was planned for, between steps or within a forward, and training goes on
with the same bits; where there is room again, the plan is as it was."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import geminifx
import pytest
import torch
from geminifx.compiler.adaptation import pressure
from geminifx.compiler.adaptation.rehoming import Rehoming
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.memory.tiers import Tier
from interrupts import Failure
from optimizing import NET, same_moments, same_weights
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from zoo import CNN, Case, compiled, cross_entropy, smallest_budget, vectors

BFLOAT16 = {"precision": "bf16", "recompute": "none"}
STEPS = 6
DROPPING = Case(
    "net with dropout",
    lambda: nn.Sequential(
        *(nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Dropout(0.2)) for _ in range(4)), nn.Linear(48, 3)
    ),
    vectors,
    cross_entropy,
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans grow again after a step without a failure."""
    monkeypatch.setattr(pressure, "PATIENT_STEPS", 1)
    yield


@dataclass
class Training:
    """A model with all of its state on the device, if the budget has room, and its optimizer."""

    model: geminifx.CompiledModule
    optimizer: Optimizer
    case: Case = NET

    @classmethod
    def of(cls, case: Case = NET, ours: bool = True, budget: int | None = None, **declared: Any) -> "Training":
        model = compiled(case, **BFLOAT16, device_budget=budget or roomy(case, ours, **declared))
        if ours:
            return cls(model, model.optimizer(AdamW, lr=1e-2, **declared), case)
        return cls(model, AdamW(model.parameters(), lr=1e-2, fused=True), case)

    @property
    def tier(self) -> Tier:
        return self.model.session.hardware.device_tier

    @property
    def least_bytes(self) -> int:
        """What its step takes with all on the host that can be."""
        rehoming = Rehoming(self.model.session)
        key = next(iter(self.model.session.programs()))
        return rehoming.chosen(key, replace(self.model.session.planning.limits, device_bytes=1)).peak_bytes

    def forward(self, step: int) -> Tensor:
        torch.manual_seed(step)
        return self.case.loss(self.model, self.case.batch(seed=step))

    def step(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.forward(step)
        loss.backward()
        self.optimizer.step()
        return loss.detach().clone()


def roomy(case: Case, ours: bool, **declared: Any) -> int:
    """A budget for all of it."""
    model = compiled(case, **BFLOAT16)
    if ours:
        model.optimizer(AdamW, lr=1e-2, **declared)
    return model.plan.peak_bytes


def check_bits(training: Training, losses: list[Tensor], **made: Any) -> None:
    calm = Training.of(**made)
    assert all(map(torch.equal, [calm.step(step) for step in range(len(losses))], losses))
    assert same_weights(training.model, calm.model)
    assert same_moments(training.optimizer, calm.optimizer)
    calm.model.eval(), training.model.eval()
    x = training.case.batch()["input"]
    with torch.no_grad():
        assert torch.equal(training.model(x), calm.model(x))  # buffers, too


WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "in the backward": {"in_backward": True},
    "clipped": {"max_grad_norm": 0.1},
    "dropping": {"case": DROPPING},
    "batch norms": {"case": CNN},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_device_that_shrinks_between_steps_and_grows_again(way: dict[str, Any]) -> None:
    training = Training.of(**way)
    before, full = training.model.plan, training.tier.limit_bytes
    losses = [training.step(0)]
    training.tier.limit_bytes = least = training.least_bytes
    losses += [training.step(step) for step in (1, 2)]
    shrunk = training.model.plan
    assert shrunk.peak_bytes <= least < before.peak_bytes
    assert training.model.stats.step.device_peak_bytes <= least
    assert shrunk.request == before.request
    training.tier.limit_bytes = full
    losses += [training.step(step) for step in range(3, STEPS)]
    assert training.model.plan.homes == before.homes
    check_bits(training, losses, **way)


def test_a_step_has_room_only_if_its_whole_plan_has() -> None:
    """The reserve for the driver and the allocator is part of it."""
    training = Training.of(in_backward=True)
    losses, planned = [training.step(0)], training.model.plan.peak_bytes
    planning = training.model.session.planning
    planning.limits = replace(planning.limits, reserve_bytes=planned // 2)
    training.tier.limit_bytes = planned
    losses.append(training.step(1))
    assert training.model.plan.peak_bytes == planned
    planning.limits = replace(planning.limits, reserve_bytes=0)
    training.tier.limit_bytes = planned - 1
    losses.append(training.step(2))
    assert training.model.plan.peak_bytes < planned
    check_bits(training, losses, in_backward=True)


@pytest.mark.parametrize("at", [0, 3, 11])
@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, partial(BudgetError, tier="device")])
@pytest.mark.parametrize(
    "way", [{"case": DROPPING}, {"case": CNN, "in_backward": True}], ids=["dropping", "batch norms"]
)
def test_a_forward_that_finds_no_memory_runs_again(way: dict[str, Any], error: Any, at: int) -> None:
    failure, training = Failure(), Training.of(**way)
    before = training.model.plan
    losses = [training.step(0)]
    training.optimizer.zero_grad()
    with mock.patch.object(Tier, "watch", failure.in_front_of(Tier.watch)), failure.armed(at, error):
        loss = training.forward(1)
    assert failure.count > at + 1  # it has failed, and run again
    assert training.model.plan.peak_bytes < before.peak_bytes
    loss.backward()
    training.optimizer.step()
    losses += [loss.detach().clone(), *(training.step(step) for step in range(2, STEPS))]
    assert training.model.plan.homes == before.homes
    check_bits(training, losses, **way)


def test_each_failure_makes_room_until_there_is_nothing_to_spare() -> None:
    training = Training.of()
    training.step(0)
    with (
        mock.patch.object(Tier, "watch", side_effect=BudgetError("no room", tier="device")),
        pytest.raises(BudgetError, match="no room"),
    ):
        training.forward(1)
    assert training.model.plan.peak_bytes == training.least_bytes
    losses = [training.step(step) for step in range(1, 3)]
    calm = Training.of()
    assert all(map(torch.equal, [calm.step(step) for step in range(3)][1:], losses))


def test_a_device_that_shrinks_within_a_forward() -> None:
    training = Training.of()
    least = training.least_bytes
    watch, passed = Tier.watch, []

    def shrinking(tier: Tier, *about: Any, **more: Any) -> None:
        passed.append(tier)
        if len(passed) == 5:
            tier.limit_bytes = least
        watch(tier, *about, **more)

    losses = [training.step(0)]
    with mock.patch.object(Tier, "watch", shrinking):
        losses.append(training.step(1))
    assert training.model.plan.peak_bytes <= least
    check_bits(training, losses)


def test_what_the_forward_has_changed_is_not_computed_twice() -> None:
    """A forward that fails for want of memory behind its writes to buffers."""
    training = Training.of(CNN)
    training.step(0)
    with (
        mock.patch.object(
            type(training.model.session.machine), "check_at_rest", side_effect=BudgetError("at the end", tier="device")
        ),
        pytest.raises(BudgetError, match="at the end"),
    ):
        training.forward(1)


def test_a_host_that_is_full_is_nothing_that_less_on_the_device_helps() -> None:
    training = Training.of()
    training.step(0)
    before = training.model.plan
    with (
        mock.patch.object(Tier, "watch", side_effect=BudgetError("the host is full", tier="host")) as failing,
        pytest.raises(BudgetError, match="the host is full"),
    ):
        training.forward(1)
    assert failing.call_count == 1 and training.model.plan == before


def test_masters_of_a_torch_optimizer_stay_and_its_weights_leave() -> None:
    budget = (smallest_budget(NET, **BFLOAT16) + roomy(NET, False)) // 2
    training = Training.of(ours=False, budget=budget)
    before, full = training.model.plan, training.tier.limit_bytes
    where = [home.where for home in before.homes]
    losses = [training.step(0)]
    resident = [home.resident and not home.on_device for home in before.homes]
    assert any(resident)
    training.tier.limit_bytes = before.peak_bytes - 1
    losses += [training.step(step) for step in (1, 2)]
    assert training.model.plan.homes != before.homes
    assert [home.where for home in training.model.plan.homes] == where
    training.tier.limit_bytes = full
    losses += [training.step(step) for step in (3, 4)]
    assert training.model.plan.homes == before.homes
    check_bits(training, losses, ours=False, budget=budget)


def test_updates_in_the_backward_do_not_begin_where_they_cannot_end() -> None:
    training = Training.of(in_backward=True)
    losses = [training.step(0)]
    full, training.tier.limit_bytes = training.tier.limit_bytes, 2000
    for _ in range(2):
        with pytest.raises(BudgetError, match=r"only 2,000 bytes .* nothing was updated") as refused:
            training.forward(1)
        assert refused.value.smallest_bytes is not None
    training.tier.limit_bytes = full
    losses += [training.step(step) for step in range(1, 3)]
    check_bits(training, losses, in_backward=True)


def test_a_host_without_room_for_what_would_have_to_leave_the_device_is_told() -> None:
    training = Training.of(in_backward=True)
    losses = [training.step(0)]
    full, host = training.tier.limit_bytes, training.model.session.hardware.host_tier
    training.tier.limit_bytes, host.limit_bytes = training.least_bytes, host.used_bytes
    with pytest.raises(BudgetError, match=r"could not: the host tier is full.*nothing was updated"):
        training.forward(1)
    training.tier.limit_bytes = full
    losses += [training.step(step) for step in range(1, 3)]
    check_bits(training, losses, in_backward=True)


def test_homes_that_the_user_decided_stay() -> None:
    plan = Training.of().model.plan
    model = compiled(NET, precision="bf16", plan=plan, device_budget=plan.peak_bytes)
    training = Training(model, model.optimizer(AdamW, lr=1e-2))
    training.step(0)
    training.tier.limit_bytes = training.least_bytes
    with pytest.raises(BudgetError, match="the device tier is full"):
        training.step(1)
    assert training.model.plan.homes == plan.homes


@pytest.mark.parametrize("seed", range(4))
def test_wherever_the_device_shrinks_losses_are_the_same(seed: int) -> None:
    chance = random.Random(seed)
    way = chance.choice(list(WAYS.values()))
    training = Training.of(**way)
    full, least = training.tier.limit_bytes, training.least_bytes
    assert full is not None
    losses = []
    for step in range(STEPS):
        training.tier.limit_bytes = chance.choice([full, chance.randint(least, full)])
        losses.append(training.step(step))
        assert training.model.stats.step.device_peak_bytes <= training.tier.limit_bytes
    check_bits(training, losses, **way)
