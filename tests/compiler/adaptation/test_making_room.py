"""Making room: a larger batch comes after a smaller one that has filled the device with training states. These move,
and every bit is that of a training in which nothing moves; or the batch is refused, and nothing has changed."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import geminifx
import pytest
import torch
from geminifx.compiler.adaptation.rehoming import Rehoming
from geminifx.runtime.isa.errors import BudgetError
from optimizing import same_moments, same_weights
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from zoo import Case, compiled, cross_entropy, vectors

SMALL, LARGE = 4, 64
ADVISED = r"with the training state where it is .* begin with the largest batch"
ORDER = (SMALL, LARGE, SMALL, LARGE, SMALL)
DEEP = Case(
    "deep net with dropout",
    lambda: nn.Sequential(
        *(nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)), nn.Linear(48, 3)
    ),
    vectors,
    cross_entropy,
)
OPTIONS = {"precision": "bf16", "recompute": "none", "microbatches": 1, "example_inputs": None}


@dataclass
class Training:
    """A model that meets batches of several sizes, and its optimizer; ours, unless nothing is declared."""

    model: geminifx.CompiledModule
    optimizer: Optimizer

    @classmethod
    def of(cls, budget: int | None, declared: dict[str, Any] | None = None, **options: Any) -> "Training":
        model = compiled(DEEP, **{**OPTIONS, "device_budget": budget, **options})
        if declared is None:
            return cls(model, AdamW(model.parameters(), lr=1e-2, fused=True))
        return cls(model, model.optimizer(AdamW, lr=1e-2, **declared))

    def forward(self, size: int, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        return DEEP.loss(self.model, vectors(size, seed))

    def step(self, size: int, seed: int = 0) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.forward(size, seed)
        loss.backward()
        self.optimizer.step()
        return loss.detach().clone()

    @property
    def facts(self) -> tuple[Any, ...]:
        """What a refusal must leave as it is."""
        session = self.model.session
        used = [tier.used_bytes for tier in session.hardware.tiers]
        return self.model.plan, session.places.homes, list(session.programs()), used, session.phase


class _Way(dict[str, Any]):
    """What an optimizer is declared with, as a key of caches."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


@cache
def least(declared: "_Way | None" = None) -> int:
    """The smallest budget for the large batch where it comes first."""
    with pytest.raises(BudgetError) as refused:
        Training.of(1, declared).forward(LARGE)
    assert refused.value.smallest_bytes is not None
    return refused.value.smallest_bytes


def check_bits(training: Training, losses: list[Tensor], order: tuple[int, ...], declared: Any, **options: Any) -> None:
    calm = Training.of(None, declared, **options)
    assert all(map(torch.equal, [calm.step(size, seed) for seed, size in enumerate(order)], losses))
    assert same_weights(training.model, calm.model)
    assert same_moments(training.optimizer, calm.optimizer)


WAYS = {
    "ours": _Way(),
    "in the backward": _Way(in_backward=True),
    "clipped": _Way(max_grad_norm=0.1),
    "in 8 bits": _Way(in_backward=True, moments="int8"),
}


@pytest.mark.parametrize("declared", WAYS.values(), ids=WAYS)
def test_a_budget_that_is_enough_for_the_larger_batch_first_is_enough_for_it_later(declared: _Way) -> None:
    budget = least(declared)
    training = Training.of(budget, declared)
    losses = [training.step(SMALL)]
    before = training.model.plan.homes
    losses += [training.step(size, seed) for seed, size in list(enumerate(ORDER))[1:]]
    assert sum(home.on_device for home in training.model.plan.homes) < sum(home.on_device for home in before)
    assert training.model.stats.device_peak_bytes <= budget
    assert all(compiled.plan.peak_bytes <= budget for compiled in training.model.session.programs().values())
    check_bits(training, losses, ORDER, declared)


def test_one_byte_less_is_refused_naming_the_smallest_budget_and_nothing_changes() -> None:
    declared = WAYS["ours"]
    training = Training.of(least(declared) - 1, declared)
    losses = [training.step(SMALL)]
    before = training.facts
    with pytest.raises(BudgetError, match="smallest that works for these inputs") as refused:
        training.forward(LARGE)
    assert refused.value.smallest_bytes == least(declared)
    assert "where it is" not in str(refused.value) and "largest batch" not in str(refused.value)
    assert training.facts == before
    losses.append(training.step(SMALL, 1))
    check_bits(training, losses, (SMALL, SMALL), declared)


def test_the_plan_says_what_moved_and_a_call_is_prepared_alike() -> None:
    declared = WAYS["ours"]
    training = Training.of(least(declared), declared)
    training.step(SMALL)
    training.model.prepare(vectors(LARGE)["input"])
    assert "were moved to other homes for a larger batch" in " ".join(training.model.plan.notes)
    programs = list(training.model.session.programs())
    training.step(LARGE)
    assert list(training.model.session.programs()) == programs


def test_between_the_backwards_of_one_step_states_stay() -> None:
    declared = _Way(accumulate=2)
    training = Training.of(least(declared), declared)

    def step(*sizes: int) -> None:
        for size in sizes:
            training.forward(size).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()

    step(SMALL, SMALL)
    training.forward(SMALL).backward()
    before = training.facts
    with pytest.raises(BudgetError, match=ADVISED):
        training.forward(LARGE)
    assert training.facts == before
    step(SMALL)
    step(LARGE, SMALL)
    assert training.model.plan.homes != before[0].homes


def test_several_forwards_before_one_backward() -> None:
    """States move while the first forward's program sleeps."""
    declared = WAYS["ours"]
    budget = least(declared) + 4_000  # for the activations of both

    def steps(training: Training) -> list[Tensor]:
        losses = [training.step(1)]
        training.optimizer.zero_grad()
        losses.append(training.forward(1, 1) + training.forward(LARGE, 2))
        losses[-1].backward()
        training.optimizer.step()
        return losses

    training, calm = Training.of(budget, declared), Training.of(None, declared)
    assert all(map(torch.equal, steps(training), steps(calm)))
    assert training.model.plan.notes, "they have moved"
    assert same_weights(training.model, calm.model)


def test_masters_of_a_torch_optimizer_stay_and_the_advice_holds() -> None:
    budget = least()
    training = Training.of(budget)
    losses = [training.step(SMALL)]
    before = training.facts
    with pytest.raises(BudgetError, match=ADVISED) as refused:
        training.forward(LARGE)
    assert refused.value.smallest_bytes is not None and refused.value.smallest_bytes > budget
    assert training.facts == before
    losses.append(training.step(SMALL, 1))
    check_bits(training, losses, (SMALL, SMALL), None)
    with pytest.raises(BudgetError, match=r"smallest .* begin with the largest batch") as refused:
        training.forward(16 * LARGE)  # too large where it comes first, too
    assert refused.value.smallest_bytes is not None and "where it is" not in str(refused.value)
    other = Training.of(budget)
    for size in (LARGE, SMALL, LARGE):
        other.step(size)
    assert other.model.stats.device_peak_bytes <= budget


def test_a_host_without_room_for_what_would_have_to_leave_the_device() -> None:
    declared = WAYS["ours"]
    training = Training.of(least(declared), declared)
    losses = [training.step(SMALL)]
    host, before = training.model.session.hardware.host_tier, training.facts
    full, host.limit_bytes = host.limit_bytes, host.used_bytes
    with pytest.raises(BudgetError, match="begin with the largest batch"):
        training.forward(LARGE)
    assert training.facts == before
    host.limit_bytes = full
    losses += [training.step(size, seed) for seed, size in ((1, SMALL), (2, LARGE))]
    assert training.model.plan.homes != before[0].homes
    check_bits(training, losses, (SMALL, SMALL, LARGE), declared)


def test_an_earlier_program_that_would_no_longer_fit_keeps_states_where_they_are() -> None:
    declared = WAYS["ours"]
    training = Training.of(least(declared), declared)
    training.step(SMALL)
    before, following = training.facts, Rehoming.following

    def lacking(rehoming: Rehoming, *about: Any) -> Any:
        plans = following(rehoming, *about)
        more = {key: replace(plan.estimate, peak_bytes=least(declared) + 1) for key, plan in plans.items()}
        return {key: replace(plan, estimate=more[key]) for key, plan in plans.items()}

    with (
        mock.patch.object(Rehoming, "following", lacking),
        pytest.raises(BudgetError, match="begin with the largest batch"),
    ):
        training.forward(LARGE)
    assert training.facts == before
    training.step(SMALL)


@pytest.mark.parametrize("given", ["plan", "cpu"])
def test_homes_that_the_user_decided_stay(given: str) -> None:
    declared = WAYS["ours"]
    planned = Training.of(None, declared, placement="cpu") if given == "cpu" else Training.of(least(declared), declared)
    planned.step(SMALL)
    plan = planned.model.plan
    options = {"placement": "cpu"} if given == "cpu" else {"plan": plan}
    training = Training.of(plan.peak_bytes, declared, **options)
    training.step(SMALL)
    before = training.facts
    with pytest.raises(BudgetError, match="smallest that works for these inputs") as refused:
        training.forward(LARGE)
    assert "where it is" not in str(refused.value) and "largest batch" not in str(refused.value)
    assert training.facts == before


def test_a_step_that_is_measured_is_not_taken_for_one_with_the_homes_before() -> None:
    declared = WAYS["ours"]
    training = Training.of(least(declared), declared, warmup=2)
    training.step(SMALL)
    warm_up = training.model._facade_calls.adaptation.warm_up
    assert warm_up.watch is not None
    training.step(LARGE)
    assert warm_up.watch is None
    homes = training.model.plan.homes
    for seed in range(6):
        training.step(LARGE, seed)
    assert training.model.plan.homes == homes


def test_a_larger_batch_while_other_processes_hold_some_of_the_device() -> None:
    """States have moved for want of memory before."""
    declared, order = WAYS["in the backward"], (SMALL, SMALL, LARGE, SMALL)
    training = Training.of(None, declared)
    losses = [training.step(SMALL)]
    tier, homes = training.model.session.hardware.device_tier, [training.model.plan.homes]
    tier.limit_bytes = least(declared)
    for seed, size in list(enumerate(order))[1:]:
        losses.append(training.step(size, seed))
        homes.append(training.model.plan.homes)
        assert training.model.stats.step.device_peak_bytes <= least(declared)
    assert homes[0] != homes[1] != homes[2]
    check_bits(training, losses, order, declared)
