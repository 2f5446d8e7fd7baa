"""Lion: its rule, the same numbers in our own optimizer wherever states lie, and what is of another optimizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx import Lion
from geminifx.runtime.isa.errors import ArgumentError, CheckpointError
from geminifx.runtime.isa.moments import BLOCK
from optimizing import NET, PLACES, Loop, equal, homes_of, values
from torch.optim import AdamW
from zoo import compiled

HYPER: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def placed(where: str, precision: str | None = "bf16", **options: Any) -> geminifx.CompiledModule:
    """A model whose plan is for Lion, its states placed by hand."""
    model = compiled(NET, precision=precision, recompute="none")
    model.optimizer(Lion, **options)
    plan = replace(model.plan, homes=homes_of(where, model.plan))
    return compiled(NET, precision=precision, plan=plan)


def test_steps_go_by_the_sign_of_what_gradient_and_mean_say_together() -> None:
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0], requires_grad=True)
    optimizer = Lion([weight], lr=0.5, betas=(0.5, 0.75), weight_decay=0.5)
    weight.grad = torch.tensor([4.0, -4.0, 0.0, float("nan"), 8.0])
    optimizer.step()
    assert weight[:3].tolist() == [0.75 - 0.5, 0.75 + 0.5, 0.75] and weight[3].isnan() and weight[4] == -1.5 - 0.5
    assert optimizer.state[weight]["exp_avg"][:3].tolist() == [1.0, -1.0, 0.0]
    weight.grad = torch.tensor([-0.5, 2.0, 0.0, 0.0, 0.0])
    optimizer.step()  # the mean outvotes the first gradient, and the second one the mean
    assert weight[:3].tolist() == [0.25 * 0.75 - 0.5, 1.25 * 0.75 - 0.5, 0.75 * 0.75]


@pytest.mark.parametrize(
    "options", [{}, {"moments": "int8"}, {"moments": "bf16", "masters": "bf16-stochastic"}], ids=str
)
def test_wherever_states_lie_and_whenever_they_are_updated_the_bits_are_the_same(options: dict[str, Any]) -> None:
    found = []
    for number, where in enumerate(PLACES):
        model = placed(where, **options)
        optimizer = model.optimizer(Lion, in_backward=number % 2 == 1, **options, **HYPER)
        found.append([*Loop(steps=2).run(NET, model, optimizer), *values(model, optimizer)])
    assert all(equal(tensors, found[0]) for tensors in found)


def test_numbers_are_those_of_the_class() -> None:
    """In float32 over parameters of the source, and over the compiled model's."""
    source = NET.seeded()
    plain = Lion(source.parameters(), **HYPER)
    losses = Loop(steps=3).run(NET, source, plain)
    model = placed("mixed", precision=None)
    optimizer = model.optimizer(Lion, **HYPER)
    assert torch.equal(torch.stack(Loop(steps=3).run(NET, model, optimizer)), torch.stack(losses))
    assert equal(
        values(model, optimizer), [*source.state_dict().values(), *(s["exp_avg"] for s in plain.state.values())]
    )


@pytest.mark.parametrize(
    ("options", "bytes_of_blocks"),
    [({}, 8 * BLOCK), ({"moments": "int8"}, 5 * BLOCK + 4),
     ({"moments": "int8", "masters": "bf16-stochastic"}, 3 * BLOCK + 4)],
    ids=str,
)  # fmt: skip
def test_it_takes_one_moment(options: dict[str, Any], bytes_of_blocks: int) -> None:
    model = placed("device", **options)
    model.optimizer(Lion, in_backward=True, **options)
    numel = sum(chunk.numel for chunk in model.plan.layout.chunks)
    assert model.session.hardware.device_tier.used_bytes * BLOCK == bytes_of_blocks * numel


def test_a_run_goes_on_from_its_states_and_its_checkpoint(tmp_path: Path) -> None:
    model, other, another = (placed(where) for where in ("host", "device", "streamed"))
    optimizer, its, own = (each.optimizer(Lion, **HYPER) for each in (model, other, another))
    Loop(steps=2).run(NET, model, optimizer)
    other.load_state_dict(model.state_dict())
    its.load_state_dict(optimizer.state_dict())
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    geminifx.load_checkpoint(another, own, tmp_path / "saved")
    ways = ((model, optimizer), (other, its), (another, own))
    found = [[*Loop(steps=2).run(NET, *way, start=2), *values(*way)] for way in ways]
    assert all(equal(tensors, found[0]) for tensors in found)


def test_what_another_optimizer_saved_is_refused(tmp_path: Path) -> None:
    model, other = placed("host"), placed("host")
    adam, lion = model.optimizer(AdamW), other.optimizer(Lion)
    Loop(steps=1).run(NET, model, adam)
    Loop(steps=1).run(NET, other, lion)
    with pytest.raises(ValueError, match="the optimizer is Lion, which has no eps, but the saved groups have one"):
        lion.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="the optimizer is AdamW, but the saved groups have no eps"):
        adam.load_state_dict(lion.state_dict())
    geminifx.save_checkpoint(model, adam, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="the checkpoint was saved with AdamW, but the optimizer is Lion"):
        geminifx.load_checkpoint(other, lion, tmp_path / "saved")


REFUSED: dict[str, tuple[Callable[[geminifx.CompiledModule], object], str]] = {
    "a rate": (lambda model: model.optimizer(Lion, lr=-1.0), "lr=-1.0; expected a number, 0 or more"),
    "an option": (lambda model: model.optimizer(Lion, eps=1e-8), "geminifx.Lion does not accept these"),
    "another kind": (
        lambda model: model.optimizer(torch.optim.Rprop),
        "kind=.*Rprop.*; expected one of .*torch.optim.SGD, geminifx.Lion",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_there_is_not_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        call(compiled(NET, precision="bf16"))
