"""The budget: planned is never below measured, the smallest one named works, and what exceeds is stopped."""

from dataclasses import replace
from pathlib import Path

import geminifx
import pytest
import torch
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.homes import Home, Where, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import BLOCKS, CASES, CNN, LLAMA, MLP, OPT, Case, compiled, smallest_budget, state_bytes, tokens, train

PLACEMENTS = ("cpu", "cuda", "auto")


ONE_OF_EACH = [c if c in (LLAMA, CNN, MLP) else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
def test_the_smallest_budget_named_works_and_one_byte_less_does_not(case: Case) -> None:
    least = smallest_budget(case)
    model = compiled(case, device_budget=least)
    train(case, model, steps=3)
    assert model.stats.device_peak_bytes <= model.plan.peak_bytes <= least < state_bytes(model)
    with pytest.raises(BudgetError, match=f"smallest that works for these inputs .* is {least:,} bytes") as refused:
        compiled(case, device_budget=least - 1)
    assert refused.value.smallest_bytes == least
    assert "whose peak consists of: " in str(refused.value)


@pytest.mark.slow
def test_cuda_keeps_everything_there_or_refuses_and_names_auto() -> None:
    least = smallest_budget(OPT, placement="cuda")
    model = compiled(OPT, device_budget=least, placement="cuda")
    train(OPT, model, steps=2)
    assert state_bytes(model) < model.stats.device_peak_bytes <= least
    assert (model.stats.to_device_bytes, model.stats.to_host_bytes) == (0, 0)
    assert model.stats.host_peak_bytes == 0
    with pytest.raises(BudgetError, match="placement='auto' or 'cpu' keeps the training state on the host"):
        compiled(OPT, device_budget=least - 1, placement="cuda")
    assert smallest_budget(OPT) < least


@pytest.mark.slow
def test_auto_uses_what_it_is_given_and_no_more() -> None:
    kept = {"recompute": "none"}
    least, most = smallest_budget(OPT, **kept), smallest_budget(OPT, placement="cuda", **kept)
    on_device, moved = [], []
    for share in (0.0, 0.35, 0.7, 1.1):
        budget = int(least + share * (most - least))
        model = compiled(OPT, device_budget=budget, **kept)
        train(OPT, model, steps=2)
        assert model.stats.device_peak_bytes <= model.plan.peak_bytes <= budget
        there = numbers(model.plan.homes, Where.DEVICE)
        staying = {i for i, home in enumerate(model.plan.homes) if home.resident}
        on_device.append((len(there), len(there | staying)))
        moved.append(model.stats.step.to_device_bytes)
    chunks = len(model.plan.layout.chunks)
    assert on_device[0] < on_device[1] < on_device[-1] == (chunks, chunks)
    assert on_device == sorted(on_device) and moved == sorted(moved, reverse=True) and moved[-1] == 0


def test_bytes_moved_are_counted_to_the_byte() -> None:
    model = compiled(MLP, placement="cpu", recompute="none")
    train(MLP, model, steps=3)
    chunks = model.plan.layout.chunks
    fetched = model.graph["training"].count("geminifx.fetch(")
    assert fetched >= 2 * len(chunks) - 1, "every chunk in the forward, almost every one in the backward"
    sizes = [chunks[i].compute_bytes for i in fetched_chunks(model)]
    assert model.stats.step.to_device_bytes == sum(sizes)
    assert model.stats.step.to_host_bytes == sum(chunk.compute_bytes for chunk in chunks)
    assert (model.stats.steps, model.stats.to_device_bytes) == (3, 3 * sum(sizes))
    with torch.no_grad():
        model(MLP.batch()["input"])
    assert model.stats.step.to_host_bytes == 0 and model.stats.steps == 4
    assert model.stats.step.to_device_bytes == sum(chunk.compute_bytes for chunk in chunks)


def fetched_chunks(model: geminifx.CompiledModule) -> list[int]:
    text = model.graph["training"].split("geminifx.fetch(")[1:]
    return [int(call.split(",")[0]) for call in text]


def test_resident_weights_are_fetched_once_a_step() -> None:
    streamed = compiled(BLOCKS, placement="cpu")
    plan = streamed.plan
    everything = tuple(Home(resident=True) for _ in plan.homes)
    resident = compiled(BLOCKS, plan=replace(plan, homes=everything))
    for model in (streamed, resident):
        train(BLOCKS, model, steps=2)
    used = sum(plan.layout.chunks[i].compute_bytes for i in set(fetched_chunks(resident)))
    assert resident.stats.step.to_device_bytes == used < streamed.stats.step.to_device_bytes
    assert resident.stats.device_peak_bytes <= resident.plan.peak_bytes


def test_the_hosts_account_holds_what_is_planned() -> None:
    model = compiled(MLP, placement="cpu")
    train(MLP, model, steps=2)
    padded = sum(16 * chunk.numel for chunk in model.plan.layout.chunks)
    # Without an accelerator gradients need no staging, which the plan still counts.
    assert model.stats.host_peak_bytes == padded <= model.plan.estimate.host_bytes


def test_a_host_budget_that_is_too_small_is_refused_and_names_one_that_works() -> None:
    with pytest.raises(BudgetError, match=r"host memory, but 1\.00 kB may be used.*raise host_budget") as refused:
        compiled(MLP, placement="cpu", host_budget=1000)
    least = refused.value.smallest_bytes
    assert least is not None
    train(MLP, compiled(MLP, placement="cpu", host_budget=least), steps=1)
    with pytest.raises(BudgetError, match="host"):
        compiled(MLP, placement="cpu", host_budget=least - 1)
    train(MLP, compiled(MLP, placement="cuda", host_budget=1), steps=1)


def test_a_budget_as_text_and_as_a_share() -> None:
    assert compiled(MLP, device_budget="1GiB").plan.request.budget_bytes == 2**30
    half, whole = (compiled(MLP, device_budget=share).plan.request.budget_bytes for share in ("50%", "100%"))
    assert half is not None and whole is not None and half == whole // 2
    assert compiled(MLP).plan.request.budget_bytes is None


def test_a_plan_too_optimistic_is_stopped_and_training_goes_on_afterwards() -> None:
    """A plan for the smallest budget, in an arena that has a byte less than the step takes."""
    least = smallest_budget(OPT, placement="cpu")  # where states do not move to make room
    model, undisturbed = (compiled(OPT, device_budget=least, placement="cpu") for _ in range(2))
    for each in (model, undisturbed):
        train(OPT, each, steps=1)
        each.zero_grad()
    device, weights = model.session.hardware.tiers[0], [p.detach().clone() for p in model.parameters()]
    device.limit_bytes = model.stats.device_peak_bytes - 1
    try:
        train(OPT, model, steps=1)
    except BudgetError as error:
        assert "the device tier is full" in str(error)
    else:
        raise AssertionError("the step needs a byte more than there is")
    assert all(map(torch.equal, weights, model.parameters()))
    device.limit_bytes = least
    found, expected = train(OPT, model, steps=2), train(OPT, undisturbed, steps=2)
    assert all(map(torch.equal, found.losses, expected.losses))
    assert all(map(torch.equal, model.parameters(), undisturbed.parameters()))
    assert model.stats.device_peak_bytes <= least


def test_a_batch_too_large_for_the_budget_is_refused_at_its_call_and_smaller_ones_go_on() -> None:
    least = smallest_budget(OPT)
    model = compiled(OPT, device_budget=least)
    train(OPT, model, steps=1)
    with pytest.raises(BudgetError, match="A smaller batch or sequence needs less") as refused:
        model(**tokens(4, 32))
    assert refused.value.smallest_bytes is not None and refused.value.smallest_bytes > least
    train(OPT, model, steps=1)
    assert model.stats.device_peak_bytes <= least


def test_evaluation_before_training_leaves_training_its_room() -> None:
    """A program with less to hold must not keep so much on the device that the next has too little."""
    case = Case("deep", lambda: nn.Sequential(*(nn.Linear(128, 128) for _ in range(8))))
    x = torch.randn(500, 128)
    options = {"example_inputs": (x,), "recompute": "none"}
    least = geminifx.compile(case.seeded(), placement="cpu", **options).plan.peak_bytes
    budget = least + 200_000
    model = geminifx.compile(case.seeded(), device_budget=budget, **options)
    for _ in range(2):
        with torch.no_grad():
            model.eval()(x[:10])
            model(x)
        model.train()(x).sum().backward()
        model(x[:100]).sum().backward()
    assert model.stats.device_peak_bytes <= budget


class LossAndMore(nn.Module):
    """Its outputs, not its gradients, are the peak of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 2), nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).sum(), "logits": self.scale.detach().expand(100_000) * 2.0}


@pytest.mark.parametrize("training", [True, False])
def test_results_held_through_the_next_step_are_within_the_plan(training: bool) -> None:
    """`out = model(...)` in a loop: the last step's logits live until the next call has returned."""
    x = torch.ones(4, 8)
    with torch.set_grad_enabled(training):
        with pytest.raises(BudgetError) as refused:
            geminifx.compile(LossAndMore(), device_budget=1)(x)
        assert refused.value.smallest_bytes is not None
        model = geminifx.compile(LossAndMore(), device_budget=refused.value.smallest_bytes)
        for _ in range(3):
            out = model(x)
            if training:
                out["loss"].backward()
    assert 800_000 < model.stats.device_peak_bytes <= refused.value.smallest_bytes


@settings(max_examples=12)
@given(
    widths=st.lists(st.integers(1, 96), min_size=1, max_size=5),
    batch=st.integers(1, 64),
    placement=st.sampled_from(PLACEMENTS),
    recompute=st.sampled_from(["none", "all", "auto"]),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_planned_is_never_below_measured(
    widths: list[int], batch: int, placement: str, recompute: str, precision: str
) -> None:
    sizes = [7, *widths]
    layers = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in zip(sizes, widths, strict=False)]
    x = torch.ones(batch, 7)
    model = geminifx.compile(
        nn.Sequential(*layers), placement=placement, recompute=recompute, precision=precision, example_inputs=(x,)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(x).float().square().mean().backward()
        optimizer.step()
    assert model.stats.device_peak_bytes <= model.plan.peak_bytes
    # And not far above it: a plan that doubles everything would keep any budget, too.
    assert model.plan.peak_bytes < 2.5 * model.stats.device_peak_bytes


def test_a_plans_own_figures_are_checked_and_not_believed(tmp_path: Path) -> None:
    honest = compiled(MLP, placement="cpu").plan
    estimate = replace(honest.estimate, peak_bytes=1, step_s=1e-9)
    lying = replace(honest, estimate=estimate, request=replace(honest.request, budget_bytes=1))
    path = tmp_path / "plan.json"
    lying.save(path)
    with pytest.raises(BudgetError, match="too small"):
        compiled(MLP, plan=path, device_budget=honest.peak_bytes - 1)
    model = compiled(MLP, plan=Plan.load(path), device_budget=honest.peak_bytes)
    assert model.plan.estimate == honest.estimate and model.plan.request.budget_bytes == honest.peak_bytes


def test_a_batch_norms_statistics_are_planned_in_the_dtype_that_kernels_keep() -> None:
    """In bf16 they are float32 all the same, whatever torch's fake kernels say."""
    model = compiled(CNN, precision="bf16", placement="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        CNN.loss(model, CNN.batch(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.stats.device_peak_bytes <= model.plan.peak_bytes
