"""`model.optimizer(masters="bf16-stochastic")`: bytes, the same bits wherever states lie, what is read and loaded."""

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
from geminifx.runtime.isa.moments import BLOCK
from geminifx.runtime.kernels.host_updates import TORCH, HostKernel
from geminifx.runtime.kernels.rounding import Draws, key_of
from geminifx.runtime.kernels.split_pairs import SplitPair
from geminifx.runtime.kernels.update_rules import AdamHyper, AdamMoments, Gradient
from geminifx.runtime.optimizer.declared import Declared
from optimizing import NET, PLACES, Loop, homes_of
from torch import nn
from torch.optim import SGD, AdamW
from zoo import compiled

ROUNDED: dict[str, Any] = {"masters": "bf16-stochastic"}
HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


@cache
def plan_for(moments: str, masters: str = "bf16-stochastic") -> Plan:
    """A plan whose chunks are cut for such moments."""
    model = compiled(NET, precision="bf16", recompute="none")
    model.optimizer(AdamW, moments=moments, masters=masters)
    return model.plan


def placed(where: str, moments: str = "exact", masters: str = "bf16-stochastic") -> geminifx.CompiledModule:
    plan = plan_for(moments, masters)
    return compiled(NET, precision="bf16", plan=replace(plan, homes=homes_of(where, plan)))


# -- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moments", "bytes_of_blocks"), [("exact", 10 * BLOCK), ("bf16", 6 * BLOCK), ("int8", 4 * BLOCK + 8)]
)
def test_a_parameter_takes_its_weight_and_its_moments(moments: str, bytes_of_blocks: int) -> None:
    model = placed("device", moments)
    model.optimizer(AdamW, in_backward=True, moments=moments, **ROUNDED)
    numel = sum(chunk.numel for chunk in model.plan.layout.chunks)
    device = model.session.hardware.device_tier.used_bytes
    assert device * BLOCK == bytes_of_blocks * numel
    assert dict(model.plan.estimate.at_peak)["training state"] == device
    assert "masters as bf16, rounded stochastically" in str(model.plan)
    assert Plan.from_json(model.plan.to_json()) == model.plan


@pytest.mark.parametrize("where", ["host", "streamed", "host, spare"])
def test_planned_and_booked_bytes_are_what_is_there(where: str) -> None:
    model = placed(where, "int8")
    optimizer = model.optimizer(AdamW, moments="int8", **ROUNDED, **HYPER)
    Loop(steps=2).run(NET, model, optimizer)
    model.session.machine.store.finish()
    store, host = model.session.machine.store, model.session.hardware.host_tier
    tensors = [t for state in store.states for t in (state.weights, state.rest, *state.moments, state.held)]
    tensors += [t for state in store.states if state.spare is not None for t in state.spare.tensors]
    assert host.used_bytes == sum(t.nbytes for t in tensors if t is not None) == model.plan.estimate.host_bytes
    assert model.session.hardware.device_tier.peak_bytes <= model.plan.peak_bytes


# -- the same bits everywhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["exact", "int8"])
def test_wherever_states_lie_and_whenever_they_are_updated_the_bits_are_the_same(moments: str) -> None:
    found = []
    for number, where in enumerate(PLACES):
        model = placed(where, moments)
        optimizer = model.optimizer(AdamW, moments=moments, in_backward=number % 2 == 1, **ROUNDED, **HYPER)
        found.append([*Loop(steps=2).run(NET, model, optimizer), *values(model, optimizer)])
    assert all(equal(tensors, found[0]) for tensors in found)


def test_however_chunks_are_cut_the_bits_are_the_same() -> None:
    """Cut for blocks of 256, or not."""
    found = []
    for plan in (plan_for("exact"), plan_for("int8")):
        model = compiled(NET, precision="bf16", plan=plan)
        optimizer = model.optimizer(AdamW, **ROUNDED, **HYPER)
        found.append([*Loop(steps=2).run(NET, model, optimizer), *values(model, optimizer)])
    assert plan_for("exact").layout != plan_for("int8").layout and equal(*found)


def test_steps_are_those_of_the_rule_rounded_by_seed_step_name_and_element() -> None:
    """A training loop of plain torch over weights in bfloat16."""
    model = placed("mixed")
    optimizer = model.optimizer(AdamW, seed=5, **ROUNDED, **HYPER)
    weights = {name: value.bfloat16() for name, value in model.state_dict().items()}
    kept = {n: AdamMoments(*(torch.zeros(v.numel()) for _ in range(2))) for n, v in weights.items()}
    for step in range(1, 4):
        NET.loss(model, NET.batch(seed=step)).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        for name, weight in weights.items():
            pair = SplitPair(weight.view(-1), None, Draws(key_of(5, step, name)))
            hyper = AdamHyper(1e-2, 0.9, 0.999, 1e-8, 0.1, step)
            HostKernel(TORCH).adam(pair, Gradient(gradients[name].view(-1)), kept[name], hyper, 1)
    assert all(torch.equal(value, weights[name].float()) for name, value in model.state_dict().items())


def test_accumulated_gradients_and_momentum_go_as_well() -> None:
    found = []
    for where in ("device", "host", "streamed"):
        model = placed(where)
        optimizer = model.optimizer(SGD, lr=1e-2, momentum=0.9, accumulate=2, **ROUNDED)
        found.append([*Loop(steps=2, micro=2).run(NET, model, optimizer), *values(model, optimizer)])
    assert all(equal(tensors, found[0]) for tensors in found)


def test_what_is_too_small_for_bfloat16_is_not_lost() -> None:
    """A rate of which each step is a tenth of what a weight of 1 can be changed by."""
    torch.manual_seed(0)
    source = nn.Linear(64, 64, bias=False)
    nn.init.ones_(source.weight)
    model = geminifx.compile(source, device="cpu", precision="bf16", example_inputs={"input": torch.ones(1, 64)})
    optimizer = model.optimizer(SGD, lr=2.0**-8 / 10, **ROUNDED)
    for _ in range(20):
        model(torch.ones(1, 64)).sum().backward()  # gradients of 1
        optimizer.step()
        optimizer.zero_grad()
    assert model.state_dict()["weight"].mean().item() == pytest.approx(1 - 20 * 2.0**-8 / 10, abs=2.0**-8 / 20)


def test_a_model_in_bfloat16_and_norms_in_float32_go_as_well() -> None:
    """A batch norm keeps computing in float32, and its masters are exact."""
    source = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).bfloat16()
    source[1].float()
    model = geminifx.compile(source, device="cpu", precision="bf16", example_inputs={"input": torch.ones(4, 16)})
    optimizer = model.optimizer(AdamW, **ROUNDED, **HYPER)
    for step in range(2):
        inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        model(inputs).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = model.state_dict()
    assert torch.equal(found["0.weight"], found["0.weight"].bfloat16().float())
    assert not torch.equal(found["1.bias"], found["1.bias"].bfloat16().float())


# -- state_dict and checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_run_goes_on_from_its_states_and_its_checkpoint_with_the_same_bits(kind: type, tmp_path: Path) -> None:
    def made(where: str) -> tuple[geminifx.CompiledModule, torch.optim.Optimizer]:
        model = placed(where)
        return model, model.optimizer(kind, **ROUNDED, **HYPER, **({"momentum": 0.9} if kind is SGD else {}))

    model, optimizer = made("host")
    Loop(steps=2).run(NET, model, optimizer)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    (by_dict, its), (by_file, own) = made("device"), made("streamed")
    by_dict.load_state_dict(model.state_dict())
    its.load_state_dict(optimizer.state_dict())
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    geminifx.load_checkpoint(by_file, own, tmp_path / "saved")
    ways = ((model, optimizer), (by_dict, its), (by_file, own))
    found = [[*Loop(steps=2).run(NET, *way, start=2), *values(*way)] for way in ways]
    assert all(equal(tensors, found[0]) for tensors in found)


@pytest.mark.parametrize(("before", "now"), [("exact", "bf16-stochastic"), ("bf16-stochastic", "exact")])
def test_a_checkpoint_of_other_masters_is_converted_and_said_so(
    before: str, now: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = placed("host", masters=before), placed("device", masters=now)
    optimizer = model.optimizer(AdamW, masters=before, **HYPER)
    again = other.optimizer(AdamW, masters=now, **HYPER)
    Loop(steps=2).run(NET, model, optimizer)
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    geminifx.load_checkpoint(other, again, tmp_path / "saved")
    assert f"masters were stored as {before}" in caplog.text
    for name, value in model.state_dict().items():
        expected = value if now == "exact" else value.bfloat16().float()
        assert torch.equal(other.state_dict()[name], expected)


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "arguments", "message"),
    [
        ("bf16", {"masters": "bf16"}, "'bf16'; expected one of 'exact', 'bf16-stochastic'"),
        ("bf16", {"seed": 0.5}, "seed.*0.5; expected an int"),
        ("fp16", ROUNDED, r"no trained parameter has such a master: .* computes in torch.float16"),
        (None, ROUNDED, r"computes in torch.float32.*; compile with precision='bf16'"),
    ],
)
def test_what_there_is_not_is_refused(precision: str | None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compiled(NET, precision=precision).optimizer(AdamW, **arguments)


def test_tensors_that_are_sharded_over_processes_are_refused() -> None:
    declared = Declared(AdamW, {}, **ROUNDED)
    trained = {"weight": (torch.float32, torch.bfloat16)}
    declared.check_masters(trained, sharded=False)
    with pytest.raises(ArgumentError, match=r"not known where tensors are sharded .* tensor= out of parallel="):
        declared.check_masters(trained, sharded=True)
    Declared(AdamW, {}).check_masters(trained, sharded=True)
