"""`model.optimizer(moments=...)`: bytes, the same bits wherever states lie, what states are read and loaded as."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from exported import equal, values
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.errors import ArgumentError
from geminifx.runtime.isa.moments import BLOCK, stored_numel
from geminifx.runtime.kernels.host_updates import TORCH, HostKernel
from geminifx.runtime.kernels.moments import narrow, widened
from geminifx.runtime.kernels.split_pairs import join, split
from geminifx.runtime.kernels.update_rules import AdamHyper, AdamMoments, Gradient
from optimizing import NET, PLACES, Loop, homes_of
from torch.optim import SGD, Adam, AdamW
from zoo import compiled

NARROW = ("bf16", "int8")
HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


@cache
def plan_for(moments: str, precision: str | None = "bf16") -> Plan:
    """A plan whose chunks are cut for such moments."""
    model = compiled(NET, precision=precision, recompute="none")
    model.optimizer(AdamW, moments=moments)
    return model.plan


def placed(where: str, moments: str, precision: str | None = "bf16") -> geminifx.CompiledModule:
    plan = plan_for(moments, precision)
    return compiled(NET, precision=precision, plan=replace(plan, homes=homes_of(where, plan)))


# -- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moments", "bytes_of_blocks"), [("exact", 12 * BLOCK), ("bf16", 8 * BLOCK), ("int8", 6 * BLOCK + 8)]
)
def test_a_bf16_parameter_takes_what_its_moments_are_stored_as(moments: str, bytes_of_blocks: int) -> None:
    model = placed("device", moments)
    model.optimizer(AdamW, in_backward=True, moments=moments)
    numel = sum(chunk.numel for chunk in model.plan.layout.chunks)
    device = model.session.hardware.device_tier.used_bytes
    assert device * BLOCK == bytes_of_blocks * numel
    assert dict(model.plan.estimate.at_peak)["training state"] == device
    assert moments == "exact" or f"moments as {moments}" in str(model.plan)


@pytest.mark.parametrize("moments", NARROW)
@pytest.mark.parametrize("where", ["host", "streamed", "host, spare"])
def test_planned_and_booked_bytes_are_what_is_there(where: str, moments: str) -> None:
    model = placed(where, moments)
    optimizer = model.optimizer(AdamW, moments=moments, **HYPER)
    Loop(steps=2).run(NET, model, optimizer)
    model.session.machine.store.finish()
    store, host = model.session.machine.store, model.session.hardware.host_tier
    tensors = [t for state in store.states for t in (state.weights, state.rest, *state.moments, state.held)]
    tensors += [t for state in store.states if state.spare is not None for t in state.spare.tensors]
    assert host.used_bytes == sum(t.nbytes for t in tensors if t is not None) == model.plan.estimate.host_bytes
    assert model.session.hardware.device_tier.peak_bytes <= model.plan.peak_bytes


# -- the same bits everywhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", NARROW)
def test_wherever_states_lie_and_whenever_they_are_updated_the_bits_are_the_same(moments: str) -> None:
    found = []
    for number, where in enumerate(PLACES):
        model = placed(where, moments)
        optimizer = model.optimizer(AdamW, moments=moments, in_backward=number % 2 == 1, **HYPER)
        found.append([*Loop(steps=2).run(NET, model, optimizer), *values(model, optimizer)])
    assert all(equal(tensors, found[0]) for tensors in found)


@pytest.mark.parametrize("moments", NARROW)
def test_steps_are_those_of_the_rule_between_reading_and_storing(moments: str) -> None:
    """A training loop of plain torch, which keeps masters, and moments as they are stored."""
    model = placed("mixed", moments)
    optimizer = model.optimizer(AdamW, moments=moments, **HYPER)
    masters = {name: value.clone().float() for name, value in model.state_dict().items()}
    dtype = {"bf16": torch.bfloat16, "int8": torch.uint8}[moments]
    kept = {n: [torch.zeros(stored_numel(dtype, v.numel()), dtype=dtype) for _ in range(2)] for n, v in masters.items()}
    for step in range(1, 4):
        NET.loss(model, NET.batch(seed=step)).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        for name, master in masters.items():
            pair = split(master.view(-1))
            wide = [widened(m, master.numel(), torch.float32, squares=bool(i)) for i, m in enumerate(kept[name])]
            hyper = AdamHyper(1e-2, 0.9, 0.999, 1e-8, 0.1, step)
            HostKernel(TORCH).adam(pair, Gradient(gradients[name].view(-1)), AdamMoments(*wide), hyper, 1)
            for i, moment in enumerate(kept[name]):
                narrow(wide[i], moment, squares=bool(i))
            masters[name] = join(pair).view(master.shape)
    assert all(torch.equal(value, masters[name]) for name, value in model.state_dict().items())
    states = optimizer.state_dict()["state"]
    for number, name in enumerate(masters):
        for i, key in enumerate(("exp_avg", "exp_avg_sq")):
            wide = widened(kept[name][i], masters[name].numel(), torch.float32, squares=bool(i))
            assert torch.equal(states[number][key].view(-1), wide)


@pytest.mark.parametrize("precision", [None, "fp16"])
@pytest.mark.parametrize("moments", NARROW)
def test_masters_that_are_not_split_keep_such_moments_too(moments: str, precision: str | None) -> None:
    found = []
    for where in ("device", "host", "streamed"):
        model = placed(where, moments, precision)
        optimizer = model.optimizer(AdamW, moments=moments, **HYPER)
        found.append([*Loop(steps=3).run(NET, model, optimizer), *values(model, optimizer)])
    assert all(equal(tensors, found[0]) for tensors in found)


def test_momentum_is_stored_so_too() -> None:
    found = []
    for where in ("device", "host", "streamed"):
        model = placed(where, "int8")
        optimizer = model.optimizer(SGD, lr=1e-2, momentum=0.9, moments="int8")
        found.append([*Loop(steps=3).run(NET, model, optimizer), *values(model, optimizer)])
    assert all(equal(tensors, found[0]) for tensors in found)


def test_groups_meet_at_the_borders_of_blocks() -> None:
    """Weights and biases of groups of their own, as decay wants it: no block is updated by two rules."""
    found = []
    for where in ("device", "host"):
        model = placed(where, "int8")
        groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrix], "weight_decay": decay}
                  for matrix, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
        optimizer = model.optimizer(AdamW, groups, lr=1e-2, moments="int8")
        found.append([*Loop(steps=3).run(NET, model, optimizer), *values(model, optimizer)])
    assert equal(*found)


def test_accumulated_gradients_stream_in_whole_blocks() -> None:
    found = []
    for where in ("device", "host", "streamed"):
        model = placed(where, "int8")
        optimizer = model.optimizer(AdamW, moments="int8", accumulate=2, **HYPER)
        found.append([*Loop(steps=2, micro=2).run(NET, model, optimizer), *values(model, optimizer)])
    assert all(equal(tensors, found[0]) for tensors in found)


# -- state_dict and checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("moments", NARROW)
def test_a_state_dict_is_float32_and_comes_back_to_the_same_bits(moments: str) -> None:
    model, other = placed("host", moments), placed("device", moments)
    optimizer, again = (m.optimizer(AdamW, moments=moments, **HYPER) for m in (model, other))
    Loop(steps=2).run(NET, model, optimizer)
    saved = optimizer.state_dict()
    assert {t.dtype for s in saved["state"].values() for t in s.values()} == {torch.float32}
    other.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    states = [[m.clone() for s in each.session.machine.store.states for m in s.moments] for each in (model, other)]
    assert equal(*states)
    losses = [Loop(steps=2).run(NET, each, opt, start=2) for each, opt in ((model, optimizer), (other, again))]
    assert equal(*losses)
    plain = Adam(NET.seeded().parameters())
    plain.load_state_dict(saved)  # torch's own takes it


@pytest.mark.parametrize("before", ["exact", *NARROW])
@pytest.mark.parametrize("now", ["exact", *NARROW])
def test_a_checkpoint_of_another_way_to_store_is_converted_and_said_so(
    before: str, now: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = placed("host", before), placed("device", now)
    optimizer, again = model.optimizer(AdamW, moments=before, **HYPER), other.optimizer(AdamW, moments=now, **HYPER)
    Loop(steps=2).run(NET, model, optimizer)
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    geminifx.load_checkpoint(other, again, tmp_path / "saved")
    assert (f"stored as {before}" in caplog.text) == (before != now)
    expected = optimizer.state_dict()["state"]
    for number, state in again.state_dict()["state"].items():
        for key, squares in (("exp_avg", False), ("exp_avg_sq", True)):
            value = expected[number][key].reshape(-1)
            if now != "exact":
                dtype = {"bf16": torch.bfloat16, "int8": torch.uint8}[now]
                stored = torch.empty(stored_numel(dtype, value.numel()), dtype=dtype)
                narrow(value, stored, squares=squares)
                value = widened(stored, value.numel(), torch.float32, squares=squares)
            assert torch.equal(state[key].reshape(-1), value)


# -- refusals ----------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[geminifx.CompiledModule], object], str]] = {
    "no such": (lambda model: model.optimizer(AdamW, moments="fp8"), "'fp8'; expected one of 'exact', 'bf16', 'int8'"),
    "no moments": (lambda model: model.optimizer(SGD, lr=0.1, moments="int8"), "SGD without momentum has no moments"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_there_is_not_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        call(compiled(NET, precision="bf16"))


def test_a_plan_whose_chunks_are_cut_otherwise_is_refused() -> None:
    plan = plan_for("exact")
    assert not plan.layout.is_cut_for(BLOCK) and plan_for("int8").layout.is_cut_for(BLOCK)
    model = compiled(NET, precision="bf16", plan=plan)
    with pytest.raises(ArgumentError, match=r"does not fit moments='int8'.* multiples of 256 elements"):
        model.optimizer(AdamW, moments="int8")


def test_a_sum_that_was_not_declared_streams_through_a_small_chunk_in_whole_blocks() -> None:
    """A chunk of one block: a float32 sum of it needs twice the room that was made for its gradient."""
    found = []
    for where in ("device", "streamed"):
        torch.manual_seed(0)
        source = torch.nn.Linear(15, 16, bias=True)
        model = geminifx.compile(source, device="cpu", precision="bf16", example_inputs={"input": torch.zeros(4, 15)})
        model.optimizer(AdamW, moments="int8")
        plan = replace(model.plan, homes=homes_of(where, model.plan))
        torch.manual_seed(0)
        model = geminifx.compile(torch.nn.Linear(15, 16), device="cpu", precision="bf16", plan=plan,
                                 example_inputs={"input": torch.zeros(4, 15)})  # fmt: skip
        optimizer = model.optimizer(AdamW, moments="int8", **HYPER)
        for step in range(2):
            for part in range(2):
                inputs = torch.randn(4, 15, generator=torch.Generator().manual_seed(2 * step + part))
                model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(values(model, optimizer))
    assert plan.layout.chunks[0].numel == 2 * BLOCK and equal(*found)


def test_a_plan_says_how_moments_are_stored_and_is_read_back() -> None:
    plan = plan_for("int8")
    assert Plan.from_json(plan.to_json()) == plan and plan.format.stored == "int8"
