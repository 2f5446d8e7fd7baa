"""Muon and Adafactor, which update whole parameters: torch's numbers wherever states lie, mixed with other kinds, what
they take, and what is refused."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa import whole_updates
from geminifx.runtime.isa.errors import ArgumentError
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.moments import BLOCK
from optimizing import NET, Loop, equal, held_gradients, homes_of, same_moments, same_weights, values
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Muon
from whole_parameters import ADAFACTOR, MADE, Make, adafactor, muon, of_torch
from zoo import compiled

PLACES: dict[str, Callable[[int], Home]] = {
    "device": lambda index: Home(Where.DEVICE),
    "streamed": lambda index: Home(Where.STREAMED),
    "mixed": lambda index: Home((Where.STREAMED, Where.DEVICE)[index % 2], resident=index % 3 == 0),
}


def placed(make: Make, where: str, precision: str | None = None, **options: Any) -> geminifx.CompiledModule:
    """A model whose plan is for this optimizer, its states placed by hand; what is updated by elements lies on the host
    where others travel."""
    model = compiled(NET, precision=precision, recompute="none")
    make(model, **options)
    homes = [PLACES[where](chunk.index) for chunk in model.plan.layout.chunks]
    pairs = zip(model.plan.layout.chunks, homes, strict=True)
    homes = [h if c.is_whole or h.on_device else replace(h, where=Where.HOST) for c, h in pairs]
    return compiled(NET, precision=precision, plan=replace(model.plan, homes=tuple(homes)))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", MADE)
def test_numbers_are_those_of_torch_in_float32(name: str, where: str) -> None:
    source = NET.seeded()
    expected = Loop(steps=4).run(NET, source, of_torch(name, source))
    model = placed(MADE[name], where)
    found = Loop(steps=4).run(NET, model, MADE[name](model))
    assert torch.equal(torch.stack(found), torch.stack(expected)) and same_weights(model, source)


@pytest.mark.parametrize("name", MADE)
def test_masters_of_lower_precision_are_updated_as_torch_updates_float32(name: str) -> None:
    model = placed(MADE[name], "mixed", "bf16")
    optimizer = MADE[name](model)
    source = NET.seeded()
    other = of_torch(name, source)
    for step in range(3):
        NET.loss(model, NET.batch(seed=step)).backward()
        for parameter, gradient in zip(source.parameters(), held_gradients(model).values(), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        other.step()
    assert same_weights(model, source)


@pytest.mark.parametrize(
    ("name", "options"),
    [("muon", {}), ("muon", {"moments": "int8"}), ("muon", {"moments": "bf16", "masters": "bf16-stochastic"}),
     ("adafactor", {}), ("adafactor", {"masters": "bf16-stochastic"})],
    ids=str,
)  # fmt: skip
def test_wherever_states_lie_and_whenever_they_are_updated_the_bits_are_the_same(
    name: str, options: dict[str, Any]
) -> None:
    found = []
    for number, where in enumerate(PLACES):
        model = placed(MADE[name], where, "bf16", **options)
        optimizer = MADE[name](model, in_backward=number % 2 == 1, **options)
        found.append([*Loop(steps=3).run(NET, model, optimizer), *values(model, optimizer)])
    assert all(equal(tensors, found[0]) for tensors in found)


@pytest.mark.parametrize("name", MADE)
def test_norms_are_clipped_and_backwards_added_up_as_for_others(name: str) -> None:
    source, loop = NET.seeded(), Loop(steps=3, micro=2)
    expected = loop.run(NET, source, of_torch(name, source))
    model = placed(MADE[name], "streamed")
    assert torch.equal(torch.stack(loop.run(NET, model, MADE[name](model, accumulate=2))), torch.stack(expected))
    clipped = placed(MADE[name], "streamed")
    optimizer = MADE[name](clipped, max_grad_norm=1e-3)
    Loop(steps=1).run(NET, clipped, optimizer)
    source = NET.seeded()
    Loop(steps=1, clip=1e-3).run(NET, source, of_torch(name, source))
    pairs = zip(clipped.state_dict().values(), source.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in pairs)


@pytest.mark.parametrize(
    ("options", "bytes_of_blocks"), [({}, 8 * BLOCK), ({"moments": "int8"}, 5 * BLOCK + 4)], ids=str
)
def test_muon_takes_one_moment_and_room_for_its_longest_matrix(options: dict[str, Any], bytes_of_blocks: int) -> None:
    model = placed(muon, "device", "bf16", **options)
    muon(model, in_backward=True, **options)
    chunks = model.plan.layout.chunks
    matrices = [chunk for chunk in chunks if chunk.is_whole]
    tier = model.session.hardware.device_tier
    assert sum(tier.booked(chunk.name) for chunk in matrices) * BLOCK == bytes_of_blocks * sum(
        c.numel for c in matrices
    )
    assert tier.booked("updates of whole parameters") == 2 * 24 * 48 * 48
    assert dict(model.plan.estimate.at_peak)["updates of whole parameters"] == 2 * 24 * 48 * 48


def test_adafactor_keeps_a_number_for_each_row_and_each_column() -> None:
    model = placed(adafactor, "device", "bf16")
    optimizer = adafactor(model, in_backward=True)
    factors = sum(sum(p.shape) for p in model.parameters())
    numel = sum(chunk.numel for chunk in model.plan.layout.chunks)
    names = [chunk.name for chunk in model.plan.layout.chunks]
    assert sum(map(model.session.hardware.device_tier.booked, names)) == 4 * numel + 4 * factors
    Loop(steps=1).run(NET, model, optimizer)
    first, second, *_ = optimizer.state_dict()["state"].values()
    assert {key: tuple(value.shape) for key, value in first.items()} == {
        "step": (), "row_var": (48, 1), "col_var": (1, 48),
    }  # fmt: skip
    assert tuple(second["variance"].shape) == (48,)


@pytest.mark.parametrize(("options", "per_element_bytes"), [({}, 16), ({"masters": "bf16-stochastic"}, 20)], ids=str)
def test_adafactor_takes_room_for_its_longest_parameter(options: dict[str, Any], per_element_bytes: int) -> None:
    model = placed(adafactor, "device", "bf16", **options)
    adafactor(model, in_backward=True, **options)
    booked = model.session.hardware.device_tier.booked("updates of whole parameters")
    assert booked == 2 * per_element_bytes * max(chunk.longest_numel for chunk in model.plan.layout.chunks)


def test_factors_are_of_the_last_two_dimensions() -> None:
    net = nn.Sequential(nn.Conv1d(3, 5, 2), nn.Flatten(), nn.Linear(35, 1))
    source = nn.Sequential(nn.Conv1d(3, 5, 2), nn.Flatten(), nn.Linear(35, 1))
    source.load_state_dict(net.state_dict())
    model = geminifx.compile(net, device_budget="1GB")
    optimizer, other = model.optimizer(Adafactor), Adafactor(source.parameters())
    for each, own in ((model, optimizer), (source, other)):
        torch.manual_seed(0)
        each(torch.randn(4, 3, 8)).square().mean().backward()
        own.step()
    assert same_weights(model, source) and same_moments(optimizer, other)


@pytest.mark.parametrize("name", MADE)
def test_a_run_goes_on_from_its_states_and_its_checkpoint(name: str, tmp_path: Path) -> None:
    make = MADE[name]
    model, other, another = (placed(make, where, "bf16") for where in ("device", "streamed", "mixed"))
    optimizer, its, own = (make(each) for each in (model, other, another))
    Loop(steps=2).run(NET, model, optimizer)
    other.load_state_dict(model.state_dict())
    its.load_state_dict(optimizer.state_dict())
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    geminifx.load_checkpoint(another, own, tmp_path / "saved")
    ways = ((model, optimizer), (other, its), (another, own))
    found = [[*Loop(steps=2).run(NET, *way, start=2), *values(*way)] for way in ways]
    assert all(equal(tensors, found[0]) for tensors in found)


def test_states_are_those_of_torch_and_go_on_there() -> None:
    model, source = placed(adafactor, "streamed"), NET.seeded()
    optimizer = adafactor(model)
    Loop(steps=2).run(NET, model, optimizer)
    source.load_state_dict(model.state_dict())
    other = Adafactor(source.parameters(), **ADAFACTOR)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    found, expected = (Loop(steps=2).run(NET, *way, start=2) for way in ((model, optimizer), (source, other)))
    assert torch.equal(torch.stack(found), torch.stack(expected)) and same_moments(optimizer, other)


def test_states_that_leave_the_device_are_streamed() -> None:
    """By the policy, and where a budget leaves no room."""
    for options in ({"placement": "cpu"}, {"device_budget": "400kB"}):
        model = compiled(NET, precision="bf16", **options)
        muon(model, in_backward=True)
        homes = [home for chunk, home in zip(model.plan.layout.chunks, model.plan.homes, strict=True) if chunk.is_whole]
        assert homes and all(home.where is not Where.HOST for home in homes)
    assert all(home.where is Where.STREAMED for home in homes) is ("placement" in options)


def test_what_products_take_keeps_the_modelled_device_busy() -> None:
    def busy_s() -> float:
        model = compiled(NET, precision="bf16", placement="cuda", recompute="none")
        muon(model, in_backward=True)
        return dict(model.plan.estimate.busy_s)["device"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_updates, "ITERATIONS", 0)
        without_s = busy_s()
    assert busy_s() > 1.01 * without_s


def shared(**parallel: Any) -> geminifx.CompiledModule:
    return compiled(NET, world_size=2, parallel=parallel)


def on_the_host() -> object:
    model = compiled(NET)
    muon(model)
    plan = replace(model.plan, homes=homes_of("host", model.plan))
    return muon(compiled(NET, plan=plan))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "what is no matrix": (
        lambda: compiled(NET).optimizer(Muon), r"only supports 2D parameters.*\"kind\": torch.optim.AdamW",
    ),
    "an unknown kind": (
        lambda: compiled(NET).optimizer(Muon, [{"params": [], "kind": torch.optim.Rprop}]), "the kind of a group",
    ),
    "two kinds for elements": (
        lambda: compiled(NET).optimizer(SGD, [{"params": [], "lr": 1.0}, {"params": [], "kind": AdamW}]),
        "torch.optim.AdamW, torch.optim.SGD, which are all element-wise",
    ),
    "moments of what has factors": (
        lambda: compiled(NET).optimizer(Adafactor, moments="int8"), "torch.optim.Adafactor keeps factored",
    ),
    "divided states": (lambda: muon(shared(data=2, zero=1)), "torch.optim.Muon .* zero=1 divides over processes"),
    "sharded tensors": (lambda: adafactor(shared(tensor="1d:2")), "Adafactor .* tensor= shards over processes"),
    "a plan that puts them on the host": (on_the_host, "must be on the device or streamed through it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        call()
