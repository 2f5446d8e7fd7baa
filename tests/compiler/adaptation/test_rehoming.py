"""Homes that change between steps: training goes on with the same bits, wherever states go and whenever."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.adaptation.rehoming import Rehoming
from geminifx.compiler.setup import Phase
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.homes import Homes
from geminifx.runtime.optimizer import updater
from optimizing import NET, PLACES, homes_of, same_moments, same_weights
from torch import Tensor
from torch.optim import AdamW, Optimizer
from zoo import CNN, OPT, Case, compiled

STEPS = 5
BFLOAT16 = {"precision": "bf16", "recompute": "none"}


@dataclass(frozen=True)
class Way:
    """How a model is trained."""

    case: Case = NET
    ours: bool = True
    micro: int = 1
    declared: dict[str, Any] = field(default_factory=dict)

    def made(self, **options: Any) -> tuple[geminifx.CompiledModule, Optimizer]:
        model = compiled(self.case, **{**BFLOAT16, **options})
        if not self.ours:
            return model, AdamW(model.parameters(), lr=1e-2, fused=True)
        return model, model.optimizer(AdamW, lr=1e-2, **self.declared)


WAYS = {
    "ours": Way(),
    "ours, in the backward": Way(declared={"in_backward": True}),
    "ours, accumulated": Way(micro=3, declared={"accumulate": 3}),
    "ours, accumulated in the backward": Way(micro=2, declared={"accumulate": 2, "in_backward": True}),
    "ours, accumulated without being declared": Way(micro=2),
    "ours, clipped": Way(declared={"max_grad_norm": 0.1}),
    "ours, with batch norms": Way(CNN),
    "torch's": Way(ours=False),
    "torch's, accumulated": Way(ours=False, micro=2),
}


def trained(way: Way, model: geminifx.CompiledModule, optimizer: Optimizer,
            moves: Mapping[tuple[int, int], Homes]) -> list[Tensor]:  # fmt: skip
    """Losses of a training whose homes change in front of these calls: step and part. Rates fall meanwhile."""
    torch.manual_seed(1)
    losses, schedule = [], torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(way.micro):
            if (step, part) in moves:
                moved(model, moves[step, part])
            loss = way.case.loss(model, way.case.batch(seed=10 * step + part))
            loss.backward()
            losses.append(loss.detach().clone())
        optimizer.step()
        schedule.step()
    return losses


def moved(model: geminifx.CompiledModule, homes: Homes) -> None:
    rehoming = Rehoming(model.session)
    key = next(key for key, each in model.session.programs().items() if each.trains)
    assert rehoming.move(key, rehoming.plans(key, homes, model.session.planning.limits))
    assert model.plan.homes == homes


def other_homes(way: Way, model: geminifx.CompiledModule, chance: random.Random) -> Homes:
    """Masters that a torch optimizer updates never move."""
    if way.ours:
        return homes_of(chance.choice(list(PLACES)), model.plan)
    return tuple(replace(home, resident=chance.random() < 0.5) for home in model.plan.homes)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_wherever_states_go_training_has_the_same_bits(way: Way, seed: int) -> None:
    chance = random.Random(seed)
    stays, moves = way.made(placement="cpu"), way.made(placement="cpu")
    calls = [(step, part) for step in range(STEPS) for part in range(way.micro)]
    places = {call: other_homes(way, moves[0], chance) for call in chance.sample(calls, 4)}
    losses = trained(way, *stays, {})
    assert all(map(torch.equal, trained(way, *moves, places), losses))
    assert same_weights(moves[0], stays[0])
    assert same_moments(moves[1], stays[1])


def test_programs_of_other_shapes_follow() -> None:
    way = Way(OPT)
    (model, optimizer), (stays, other) = way.made(), way.made()
    for each, step in ((model, optimizer), (stays, other)):
        short = {name: value[:, :5] for name, value in OPT.batch().items()}
        OPT.loss(each, OPT.batch()).backward()
        step.step()
        each(**short).loss.backward()
        step.step()
        each.eval()
        with torch.no_grad():
            each(**short)
        each.train()
    moved(model, homes_of("mixed", model.plan))
    for each in (model, stays):
        each.eval()
    with torch.no_grad():
        assert torch.equal(model(**short).loss, stays(**short).loss)
    where = {tuple(home.where for home in each.plan.homes) for each in model.session.programs().values()}
    assert len(model.session.programs()) == 3 and len(where) == 1


def test_an_earlier_forward_may_have_its_backward_behind_a_move() -> None:
    (model, optimizer), (stays, other) = Way().made(), Way().made()
    loss, expected = NET.loss(model, NET.batch()), NET.loss(stays, NET.batch())
    moved(model, homes_of("host", model.plan))
    for each, step in ((loss, optimizer), (expected, other)):
        each.backward()
        step.step()
    assert same_weights(model, stays)


def test_where_there_is_no_room_all_is_as_it_was() -> None:
    way = Way()
    (model, optimizer), (stays, other) = way.made(placement="cpu"), way.made(placement="cpu")
    device, host = model.session.hardware.tiers
    trained(way, model, optimizer, {})
    trained(way, stays, other, {})
    used, before = [tier.used_bytes for tier in (device, host)], model.plan
    device.limit_bytes = used[0] + 30_000  # for a part of the states
    rehoming = Rehoming(model.session)
    key = next(iter(model.session.programs()))
    plans = rehoming.plans(key, homes_of("device", model.plan), model.session.planning.limits)
    assert not rehoming.move(key, plans)
    assert (model.plan, [tier.used_bytes for tier in (device, host)]) == (before, used)
    device.limit_bytes = None
    assert all(map(torch.equal, trained(way, model, optimizer, {}), trained(way, stays, other, {})))


@pytest.mark.parametrize(
    ("way", "place", "fails"),
    [
        ("torch's", "resident", (torch, "zeros")),
        ("ours", "device", (torch, "zeros")),
        ("ours", "streamed", (updater, "StateStream")),
    ],
)
def test_where_a_device_has_not_what_its_account_says_all_is_as_it_was(
    way: str, place: str, fails: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU of which others have taken the memory meanwhile."""
    (model, optimizer), (stays, other) = WAYS[way].made(placement="cpu"), WAYS[way].made(placement="cpu")
    for each, step in ((model, optimizer), (stays, other)):
        trained(WAYS[way], each, step, {})
    before, used = model.plan, [tier.used_bytes for tier in model.session.hardware.tiers]
    rehoming, failed = Rehoming(model.session), list[bool]()
    key = next(iter(model.session.programs()))
    resident = tuple(replace(home, resident=True) for home in before.homes)
    homes = resident if place == "resident" else homes_of(place, before)
    plans = rehoming.plans(key, homes, model.session.planning.limits)
    with monkeypatch.context() as patch:
        patch.setattr(*fails, failing_once(getattr(*fails), failed))
        assert not rehoming.move(key, plans) and failed
    assert (model.plan, [tier.used_bytes for tier in model.session.hardware.tiers]) == (before, used)
    losses = trained(WAYS[way], model, optimizer, {})
    assert all(map(torch.equal, losses, trained(WAYS[way], stays, other, {})))


def failing_once(function: Callable[..., Any], failed: list[bool]) -> Callable[..., Any]:
    """The function, whose first call finds no memory on a GPU."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if failed:
            return function(*args, **kwargs)
        failed.append(True)
        raise torch.cuda.OutOfMemoryError("no memory")

    return call


@pytest.mark.parametrize("begun", [False, True])
def test_states_that_find_no_way_back_are_used_no_more(begun: bool) -> None:
    """Before the first step as behind it."""
    model, optimizer = Way().made(placement="cuda")
    if begun:
        trained(Way(), model, optimizer, {})
    device, host = model.session.hardware.tiers
    host.limit_bytes = 137_000  # for the first of two chunks, whose place others take meanwhile
    device.limit_bytes = 0
    rehoming = Rehoming(model.session)
    key = next(iter(model.session.programs()))
    plans = rehoming.plans(key, homes_of("host", model.plan), model.session.planning.limits)
    with pytest.raises(BudgetError):
        model.session.rehome(plans, key)
    assert model.session.phase is Phase.BROKEN
    with pytest.raises(BudgetError, match="the device tier is full"):
        NET.loss(model, NET.batch())


def test_the_optimizer_keeps_its_state_and_gradients_stay_readable() -> None:
    (model, optimizer), (stays, other) = Way().made(), Way().made()
    for each, step in ((model, optimizer), (stays, other)):
        trained(Way(), each, step, {})
        NET.loss(each, NET.batch()).backward()
    moved(model, homes_of("streamed", model.plan))
    pairs = zip(model.parameters(), stays.parameters(), strict=True)
    assert all(torch.equal(found.grad, expected.grad) for found, expected in pairs)
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert same_moments(optimizer, other)
