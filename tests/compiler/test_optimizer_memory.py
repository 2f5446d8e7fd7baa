"""The memory of model.optimizer: planned to the byte, never below what is measured, kept to under any budget."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.formats import LANDINGS, STREAM_BUFFERS, OwnFormat
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.optimizer.own_states import OwnStates
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizing import ADAMW, NET, PLACES, Loop, homes_of, placed, plain, same_weights
from torch import nn
from torch.optim import SGD, AdamW
from zoo import OPT, compiled, smallest_budget

pytestmark = pytest.mark.usefixtures("shared")


def elements(plan: Plan) -> int:
    return sum(chunk.numel for chunk in plan.layout.chunks)


# -- to the byte -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "on_device", "held_on_device"),
    [
        ({"in_backward": True}, 12, 0),
        ({}, 12, 2),
        ({"accumulate": 2}, 16, 0),
        ({"accumulate": 2, "in_backward": True}, 16, 0),
    ],
)
def test_a_bf16_parameter_takes_12_bytes_and_its_gradient(
    declared: dict[str, Any], on_device: int, held_on_device: int
) -> None:
    """2 of weight, 2 of remainder, 4 of each moment; on the host 2 for the gradient that is held until `step()`, and a
    few places for those that are used up as they come; 4 for a sum of them."""
    held_on_host = 2 * (declared == {})
    model = placed(NET, "device", "bf16")
    model.optimizer(AdamW, **declared)
    numel, tiers = elements(model.plan), model.session.hardware.tiers
    assert [tier.used_bytes for tier in tiers] == [on_device * numel, 0]
    state = dict(model.plan.estimate.at_peak)["training state"]
    assert (state, model.plan.estimate.host_bytes) == ((on_device + held_on_device) * numel, 0)
    model = placed(NET, "host", "bf16")
    model.optimizer(AdamW, **declared)
    chunks = model.plan.layout.chunks
    longest = max(chunk.numel for chunk in chunks)
    landings = 0 if held_on_host else 2 * longest * min(LANDINGS, len(chunks))
    on_host = (on_device + held_on_host) * numel + landings
    assert [tier.used_bytes for tier in model.session.hardware.tiers] == [0, on_host]
    assert model.plan.estimate.host_bytes == on_host
    model = placed(NET, "host, resident", "bf16")
    model.optimizer(AdamW, **declared)
    assert [tier.used_bytes for tier in model.session.hardware.tiers] == [2 * numel, on_host]
    model = placed(NET, "streamed", "bf16")
    model.optimizer(AdamW, **declared)
    gradient = {12: 0 if declared.get("in_backward") else 2, 16: 4}[on_device]
    assert model.session.hardware.tiers[0].used_bytes == STREAM_BUFFERS * longest * (12 + gradient)
    lands = declared != {"in_backward": True}
    assert model.session.hardware.host_tier.used_bytes == (on_host if lands else on_device * numel)
    assert model.plan.estimate.host_bytes == model.session.hardware.tiers[1].used_bytes
    model = placed(NET, "streamed, resident", "bf16")
    model.optimizer(AdamW, **declared)
    assert model.session.hardware.host_tier.used_bytes == (on_host if lands else on_device * numel) - 2 * numel


def many_chunks(**options: Any) -> geminifx.CompiledModule:
    """Twelve blocks, of which each is a chunk or more."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(12)), nn.Linear(128, 3))
    return geminifx.compile(
        model, device="cpu", precision="bf16", recompute="none", offload="none", microbatches=1, rates="rtx4090",
        example_inputs={"input": torch.zeros(8, 128)}, **options,
    )  # fmt: skip


def trained(model: geminifx.CompiledModule, steps: int = 3, backwards: int = 1, **declared: Any) -> list[torch.Tensor]:
    optimizer = model.optimizer(AdamW, lr=1e-2, accumulate=backwards, **declared)
    for step in range(steps):
        for part in range(backwards):
            inputs = torch.randn(8, 128, generator=torch.Generator().manual_seed(7 * step + part))
            model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize(("backwards", "in_backward"), [(1, True), (2, True), (2, False)])
def test_of_gradients_that_are_used_up_as_they_come_the_host_holds_those_under_way(
    backwards: int, in_backward: bool
) -> None:
    """Three of them, whatever the number of chunks: 12 bytes per parameter are 12, and sums 4 more. A host that has
    no room for more is no reason to refuse, and results are those of a host that has."""
    bytes_each, declared = 12 + 4 * (backwards > 1), {"backwards": backwards, "in_backward": in_backward}
    roomy = many_chunks(placement="cpu")
    expected = trained(roomy, **declared)
    chunks = roomy.plan.layout.chunks
    numel, longest = elements(roomy.plan), max(chunk.numel for chunk in chunks)
    assert len(chunks) > 2 * LANDINGS
    least = bytes_each * numel + LANDINGS * 2 * longest
    tight = many_chunks(placement="cpu", host_budget=least)
    assert all(torch.equal(a, b) for a, b in zip(trained(tight, **declared), expected, strict=True))
    assert tight.plan.estimate.host_bytes == tight.stats.host_peak_bytes == least
    with pytest.raises(BudgetError, match="host"):
        trained(many_chunks(placement="cpu", host_budget=least - 1), **declared)


def test_where_the_host_has_room_nobody_waits_for_a_place_to_land() -> None:
    """The planner gives every gradient its own where that makes the modelled step shorter, and no host budget forbids
    it."""
    model = many_chunks(placement="cpu", host_budget="1GB")
    model.optimizer(AdamW, in_backward=True)
    homes, numel = model.plan.homes, elements(model.plan)
    assert {home.lands_apart for home in homes} <= {True, False}
    assert model.plan.estimate.host_bytes >= 12 * numel
    if all(home.lands_apart for home in homes):
        assert model.plan.estimate.host_bytes == 14 * numel


@pytest.mark.parametrize(("kind", "hyper", "per_weight"), [(SGD, {}, 4), (SGD, {"momentum": 0.9}, 8), (AdamW, {}, 12)])
def test_only_moments_that_there_are_take_memory(kind: Any, hyper: dict[str, Any], per_weight: int) -> None:
    model = placed(NET, "device", "bf16")
    model.optimizer(kind, lr=0.1, in_backward=True, **hyper)
    assert model.session.hardware.tiers[0].used_bytes == per_weight * elements(model.plan)


def test_what_held_the_parameters_before_is_given_back() -> None:
    model = compiled(NET, placement="cuda", precision="bf16")
    Loop(steps=1).run(NET, model, AdamW(model.parameters()))
    assert model.session.hardware.tiers[0].used_bytes >= 16 * elements(model.plan)
    weights = model.state_dict()
    model.zero_grad()
    model.optimizer(AdamW, in_backward=True)
    assert model.session.hardware.tiers[0].used_bytes == 12 * elements(model.plan)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("where", ["device", "host"])
def test_sums_that_were_not_declared_are_booked_while_they_are_kept(where: str) -> None:
    """On the host for good, on the device from backward to update."""
    model = placed(NET, where, "bf16")
    optimizer = model.optimizer(AdamW)
    before = [tier.used_bytes for tier in model.session.hardware.tiers]
    grown = lambda: [tier.used_bytes - b for tier, b in zip(model.session.hardware.tiers, before, strict=True)]  # noqa: E731
    for seed in range(2):
        for _ in range(2):
            NET.loss(model, NET.batch(seed)).backward()
        sums = 4 * elements(model.plan)
        assert grown() == [sums * (where == "device"), sums * (where == "host")]
        optimizer.step()
        model.session.machine.store.finish()
        assert grown() == [0, sums * (where == "host")]


LOOKS: dict[str, Callable[[nn.Module], object]] = {
    "clipped by the model": lambda model: model.clip_grad_norm_(1e-2),
    "clipped by torch": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-2),
    "read": lambda model: [p.grad for p in model.parameters()],
}


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("look", LOOKS)
def test_gradients_may_be_looked_at_where_a_device_is_full(look: str, precision: str | None) -> None:
    """Their float32 sums are not planned for: they lie on the host then, or are none where nobody reads them."""
    models = [placed(NET, where, precision) for where in ("host", "device")]
    for model in models:
        optimizer = model.optimizer(AdamW)
        device, host = model.session.hardware.tiers
        before = host.used_bytes
        for step in range(3):
            NET.loss(model, NET.batch(seed=step)).backward()
            device.limit_bytes = device.used_bytes  # not a byte more
            LOOKS[look](model)
            device.limit_bytes = None
            if model is models[1]:
                sums = precision == "bf16" and look != "clipped by the model"
                assert (host.used_bytes > before) == sums  # of what is held on the device some room comes free
            optimizer.step()
            optimizer.zero_grad()
        assert model is models[0] or host.used_bytes == before
    assert same_weights(*models)


@pytest.mark.parametrize("in_backward", [False, True])
def test_bytes_moved_are_counted_to_the_byte(in_backward: bool) -> None:
    """Per parameter: the gradient comes down (2), weights go up for each use (2), or a streamed state goes both ways
    (12), its gradient coming down and up again where it is held until step()."""
    moved = {}
    for where in PLACES:
        model = placed(NET, where, "bf16")
        Loop(steps=2).run(NET, model, model.optimizer(AdamW, in_backward=in_backward))
        model.session.machine.store.finish()
        fetched = [int(i) for i in re.findall(r"geminifx\.fetch\((\d+),", model.graph["training"])]
        uses = sum(model.plan.layout.chunks[i].numel for i in fetched)
        moved[where] = model.stats.to_device_bytes, model.stats.to_host_bytes
    numel, held = elements(model.plan), 0 if in_backward else 2
    steps = 2
    assert moved["device"] == (0, 0)
    assert moved["host"] == (steps * 2 * uses, steps * 2 * numel)
    assert moved["host, resident"] == (steps * 2 * numel, steps * 2 * numel)
    assert moved["streamed"] == (steps * (2 * uses + (12 + held) * numel), steps * (12 + held) * numel)
    assert moved["streamed, resident"] == (steps * (10 + held) * numel, steps * (10 + held) * numel)


# -- planned and measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "accumulate", "in_backward"), [("fp32", 1, False), ("bf16", 2, True)])
@pytest.mark.parametrize("where", PLACES)
def test_tiers_with_just_what_is_planned_are_enough(
    where: str, precision: str, accumulate: int, in_backward: bool
) -> None:
    model = placed(NET, where, precision)
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1], in_backward=in_backward, accumulate=accumulate)
    for tier, limit in zip(
        model.session.hardware.tiers, (model.plan.peak_bytes, model.plan.estimate.host_bytes), strict=True
    ):
        assert tier.used_bytes <= limit
        tier.limit_bytes = limit
    Loop(micro=accumulate).run(NET, model, optimizer)
    assert model.stats.step.device_peak_bytes <= model.plan.peak_bytes < 1.6 * model.stats.step.device_peak_bytes


KINDS_OF_HOME = {
    "masters": Home(Where.DEVICE),
    "streamed": Home(Where.STREAMED),
    "weights": Home(resident=True),
    "both": Home(Where.STREAMED, resident=True),
    "host": Home(),
}


@pytest.mark.slow
@settings(max_examples=10)
@given(
    widths=st.lists(st.integers(1, 96), min_size=1, max_size=4),
    batch=st.integers(1, 64),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    in_backward=st.booleans(),
    accumulate=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_planned_is_never_below_measured(
    widths: list[int], batch: int, precision: str, in_backward: bool, accumulate: int, data: st.DataObject
) -> None:
    sizes = [7, *widths]
    layers = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in zip(sizes, widths, strict=False)]
    x = torch.ones(batch, 7)
    options = {"precision": precision, "example_inputs": (x,)}
    plan = geminifx.compile(nn.Sequential(*layers), **options).plan
    where = [data.draw(st.sampled_from(sorted(KINDS_OF_HOME))) for _ in plan.layout.chunks]
    chosen = tuple(KINDS_OF_HOME[kind] for kind in where)
    model = geminifx.compile(nn.Sequential(*layers), **options, plan=replace(plan, homes=chosen))
    mode = in_backward and precision != "fp16"
    optimizer = model.optimizer(AdamW, in_backward=mode, accumulate=accumulate)
    for _ in range(2 * accumulate):
        model(x).float().square().mean().backward()
        if not mode or model.session.machine.store.backwards == accumulate:
            optimizer.step()
    assert model.stats.step.device_peak_bytes <= model.plan.peak_bytes
    assert model.stats.step.host_peak_bytes <= model.plan.estimate.host_bytes


@pytest.mark.parametrize("in_backward", [False, True])
def test_under_any_budget_the_planner_keeps_to_it_and_the_numbers_stay(in_backward: bool) -> None:
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    Loop().run(NET, reference, expected)
    least, most = smallest_budget(NET, microbatches=1), smallest_budget(NET, placement="cuda", microbatches=1)
    seen = set()
    for share in (0.0, 0.4, 0.8, 1.2):
        budget = int(least + share * (most - least))
        model = compiled(NET, device_budget=budget)
        Loop().run(NET, model, model.optimizer(ADAMW[0], **ADAMW[1], in_backward=in_backward))
        assert model.stats.device_peak_bytes <= model.plan.peak_bytes <= budget
        assert model.stats.step.host_peak_bytes <= model.plan.estimate.host_bytes
        assert same_weights(model, reference)
        seen.add(model.plan.homes)
    assert len(seen) > 1


def test_a_budget_that_the_optimizers_buffers_do_not_fit_leaves_the_model_as_it_was() -> None:
    """A plan by hand that streams all states, in a device without room for them on their way."""
    model = placed(NET, "streamed", device_budget=placed(NET, "streamed").plan.peak_bytes)
    plan = model.plan
    with pytest.raises(BudgetError, match="states on their way") as refused:
        model.optimizer(AdamW)
    assert model.plan == plan and refused.value.smallest_bytes is not None
    reference, expected = plain(NET, AdamW)
    Loop().run(NET, reference, expected)
    Loop().run(NET, model, AdamW(model.parameters(), fused=True))
    assert same_weights(model, reference)
    assert placed(NET, "streamed", device_budget=refused.value.smallest_bytes).optimizer(AdamW) is not None


# -- plans -------------------------------------------------------------------------------------------------


def test_a_plan_says_how_it_updates_and_comes_back_from_json(tmp_path: Path) -> None:
    model = placed(OPT, "mixed", "bf16")
    model.optimizer(AdamW, in_backward=True, accumulate=4)
    plan = model.plan
    assert plan.format == OwnFormat(moments=2, in_backward=True, accumulate=4)
    assert plan.homes == homes_of("mixed", plan) and any(home.streamed for home in plan.homes)
    assert "the model's own, in the backward, 4 backwards each" in str(plan)
    assert re.search(r"updated on their way through +1 of", str(plan))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    again = compiled(OPT, precision="bf16", plan=tmp_path / "plan.json")
    again.optimizer(AdamW, in_backward=True, accumulate=4)
    assert again.plan == plan


@pytest.mark.parametrize("count", [2, 4])
def test_homes_for_other_chunks_than_there_are_are_refused(count: int) -> None:
    plan = placed(NET, "host").plan
    with pytest.raises(ValueError, match=f"homes is {count} of them, expected 3, one for each chunk"):
        compiled(NET, plan=replace(plan, homes=(Home(),) * count))


def test_frozen_chunks_are_not_streamed() -> None:
    source = NET.seeded()
    for parameter in source[0].parameters():
        parameter.requires_grad_(False)
    plan = geminifx.compile(source, **NET.examples(), placement="cpu").plan
    (frozen,) = (chunk.index for chunk in plan.layout.chunks if not chunk.trainable)
    with pytest.raises(ValueError, match=rf"homes\[{frozen}\]\.where is 'streamed', expected 'host' or 'device'"):
        given_plan = replace(plan, homes=tuple(Home(Where.STREAMED) for _ in plan.homes))
        geminifx.compile(source, **NET.examples(), plan=given_plan)
    # Nothing but weights and what they lack is kept of a frozen chunk.
    model = geminifx.compile(source, **NET.examples(), placement="cpu", precision="bf16")
    model.optimizer(AdamW)
    chunks = model.plan.layout.chunks
    sizes = [chunk.numel * (14 if chunk.trainable else 4) for chunk in chunks]
    assert not all(chunk.trainable for chunk in chunks)
    assert model.session.hardware.tiers[1].used_bytes == model.plan.estimate.host_bytes == sum(sizes)


def test_a_saved_plan_that_only_our_optimizer_fits_is_taken(tmp_path: Path) -> None:
    """Its whole state is on the device, where a torch optimizer's would be over the budget."""
    model = placed(NET, "device", "bf16")
    model.optimizer(AdamW, in_backward=True)
    model.plan.save(tmp_path / "plan.json")
    budget = model.plan.peak_bytes
    again = compiled(NET, precision="bf16", plan=tmp_path / "plan.json", device_budget=budget)
    with pytest.raises(BudgetError, match="too small"):
        again(next(iter(NET.batch().values())))
    optimizer = again.optimizer(AdamW, in_backward=True)
    NET.loss(again, NET.batch()).backward()
    optimizer.step()
    assert again.plan.homes == model.plan.homes
    assert again.stats.device_peak_bytes <= budget


def test_states_go_to_the_device_where_the_host_has_no_room_for_them() -> None:
    """Weights that stay would take the device's room first, and leave the host as full as it is."""
    numel, budget = elements(many_chunks(placement="cpu").plan), 1_600_000
    tight = many_chunks(device_budget=budget, host_budget=6 * numel)
    tight.optimizer(AdamW, in_backward=True)
    on_device = sum(chunk.numel for chunk, home in tight.plan.placed(tight.plan.homes) if home.on_device)
    assert tight.plan.estimate.host_bytes <= 6 * numel <= 12 * on_device and tight.plan.peak_bytes <= budget


@pytest.mark.parametrize("moments", ["exact", "int8"])
def test_a_model_becomes_a_training_state_without_a_second_copy(moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk: what the host holds of the model as it was made and of its states together is never more than
    the states take in the end, and one chunk's parameters."""
    model = many_chunks(placement="cpu")
    source, host, taken = model.source, model.session.hardware.host_tier, list[int]()
    expected, place = many_chunks(placement="cpu").state_dict(), OwnStates._place

    def measured(self: OwnStates, *args: Any) -> None:
        place(self, *args)
        taken.append(sum(p.nbytes for p in source.parameters() if type(p) is nn.Parameter) + host.used_bytes)

    monkeypatch.setattr(OwnStates, "_place", measured)
    model.optimizer(AdamW, in_backward=True, moments=moments)
    longest = max(chunk.numel for chunk in model.plan.layout.chunks)
    assert len(taken) == len(model.plan.layout.chunks) and max(taken) <= model.plan.estimate.host_bytes + 4 * longest
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
