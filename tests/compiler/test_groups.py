"""Groups of several kinds: each keeps its kind and its options, and what no memory was planned for is refused."""

import re
from copy import deepcopy
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import ArgumentError, StateError
from optimizing import NET, Loop, equal, same_moments, values
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer
from whole_parameters import ADAMW, MADE, MUON, Both, groups, muon
from zoo import compiled


def test_groups_keep_the_options_of_their_kind() -> None:
    model = compiled(NET)
    optimizer = muon(model)
    matrices, others = optimizer.param_groups
    expected = Muon([torch.zeros(1, 1)], **MUON).param_groups[0], AdamW([torch.zeros(1)], **ADAMW).param_groups[0]
    assert matrices.keys() == {*expected[0], "kind"} and others.keys() == {*expected[1], "kind"}
    assert (matrices["kind"], others["kind"], others["lr"]) == ("Muon", "AdamW", 3e-3)


def test_what_another_kind_saved_is_refused() -> None:
    model, other = compiled(NET), compiled(NET)
    optimizer = muon(model)
    swapped = other.optimizer(AdamW, [{**groups(other)[0], "kind": AdamW}, {**groups(other)[1]}]).state_dict()
    with pytest.raises(
        ValueError, match="a group of the optimizer is of kind Muon, but the saved group is of kind 'AdamW'"
    ):
        optimizer.load_state_dict(swapped)
    for group in swapped["param_groups"]:
        del group["kind"]
    with pytest.raises(ValueError, match="the optimizer is Muon, but the saved groups have no"):
        optimizer.load_state_dict(swapped)
    assert [group["kind"] for group in optimizer.param_groups] == ["Muon", "AdamW"]


def test_groups_keep_their_kind_when_what_torch_saved_is_loaded() -> None:
    source, model = NET.seeded(), compiled(NET)
    other = AdamW(source.parameters(), **ADAMW, fused=True)
    Loop(steps=2).run(NET, source, other)
    optimizer = model.optimizer(geminifx.Lion, [{"params": model.parameters(), "kind": AdamW}])
    model.load_state_dict(source.state_dict())
    for _ in ("before the states have a plan", "after"):
        optimizer.load_state_dict({**deepcopy(other.state_dict()), "state": {}})
        NET.loss(model, NET.batch(seed=0))
    optimizer.load_state_dict(deepcopy(other.state_dict()))
    assert [group["kind"] for group in optimizer.param_groups] == ["AdamW"]
    found, expected = (Loop(steps=2).run(NET, *way, start=2) for way in ((model, optimizer), (source, other)))
    assert torch.equal(torch.stack(found), torch.stack(expected)) and same_moments(optimizer, other)


def test_groups_that_were_saved_without_kinds_are_of_the_kinds_they_are_loaded_into() -> None:
    model, other = compiled(NET), compiled(NET)
    optimizer, its = muon(model), muon(other)
    Loop(steps=2).run(NET, model, optimizer)
    saved = deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["kind"]
    other.load_state_dict(model.state_dict())
    its.load_state_dict(saved)
    ways = ((model, optimizer), (other, its))
    found = [[*Loop(steps=2).run(NET, *way, start=2), *values(*way)] for way in ways]
    assert equal(*found) and its.param_groups[1]["kind"] == "AdamW"


def test_a_kind_that_changes_is_refused_and_the_run_goes_on_when_it_is_back() -> None:
    model, undisturbed = compiled(NET), compiled(NET)
    optimizer, other = muon(model), muon(undisturbed)
    NET.loss(model, NET.batch(seed=0)).backward()
    optimizer.param_groups[1]["kind"] = "SGD"
    with pytest.raises(StateError, match="the kind of a group is now 'SGD', but its memory was planned for AdamW"):
        optimizer.step()
    optimizer.param_groups[1]["kind"] = "AdamW"
    optimizer.zero_grad()
    ways = ((model, optimizer), (undisturbed, other))
    assert equal(*([*Loop(steps=2).run(NET, *way), *values(*way)] for way in ways))


WRONG: tuple[tuple[str, str, Any], ...] = (
    ("muon", "ns_steps", 100), ("muon", "ns_steps", 5.0), ("muon", "ns_coefficients", (1.0, 2.0)),
    ("muon", "ns_coefficients", (1.0, 2.0, float("nan"))), ("muon", "adjust_lr_fn", "none"), ("muon", "eps", None),
    ("adafactor", "beta2_decay", None), ("adafactor", "beta2_decay", 0.8), ("adafactor", "d", None),
    ("adafactor", "d", 0.5), ("adafactor", "eps", 1e-8), ("adafactor", "eps", (None, None)),
    ("adafactor", "eps", (-1.0, 1e-3)),
)  # fmt: skip


@pytest.mark.parametrize(("name", "option", "value"), WRONG, ids=str)
def test_an_invalid_option_is_refused_before_any_update(name: str, option: str, value: Any) -> None:
    """Where it is declared, loaded, added or set between a backward and its step; the run goes on without it."""
    told = re.escape(f"{option}={value!r}; expected ")
    (model, optimizer), (undisturbed, other) = ((model := compiled(NET), MADE[name](model)) for _ in range(2))
    with pytest.raises(ArgumentError, match=f"{option}="):
        compiled(NET).optimizer({"muon": Muon, "adafactor": Adafactor}[name], **{option: value})
    with pytest.raises(ArgumentError, match=told):
        saved = optimizer.state_dict()
        optimizer.load_state_dict({**saved, "param_groups": [g | {option: value} for g in saved["param_groups"]]})
    NET.loss(model, NET.batch(seed=0)).backward()
    valid = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    with pytest.raises(ArgumentError, match=told):
        optimizer.step()
    optimizer.param_groups[0][option] = valid
    optimizer.zero_grad()
    ways = ((model, optimizer), (undisturbed, other))
    assert equal(*([*Loop(steps=2).run(NET, *way), *values(*way)] for way in ways))


def test_the_pair_that_adafactor_has_for_eps_is_declared_as_in_torch() -> None:
    model, source, eps = compiled(NET), NET.seeded(), (1e-6, 1e-2)
    optimizer, other = model.optimizer(Adafactor, eps=eps), Adafactor(source.parameters(), eps=eps)
    found, expected = (Loop(steps=2).run(NET, *way) for way in ((model, optimizer), (source, other)))
    assert torch.equal(torch.stack(found), torch.stack(expected)) and same_moments(optimizer, other)


ADDED: dict[str, tuple[type[Optimizer], dict[str, Any], dict[str, Any], str]] = {
    "moments beside Muon": (Muon, {}, {"kind": AdamW}, "a group of kind AdamW was added"),
    "momentum beside Muon": (Muon, {}, {"kind": SGD, "momentum": 0.9}, "a group of kind SGD was added"),
    "moments beside plain SGD": (SGD, {}, {"kind": AdamW}, "AdamW, torch.optim.SGD, which are all element-wise"),
    "Lion beside momentum": (SGD, {"momentum": 0.9}, {"kind": "Lion"}, "Lion, torch.optim.SGD, which are all"),
    "factors": (AdamW, {}, {"kind": Adafactor}, "a group of kind Adafactor was added, but"),
    "a rate": (AdamW, {}, {"lr": -1.0}, "lr=-1.0; expected a number, 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADDED)
def test_a_group_that_cannot_be_added_changes_nothing(name: str) -> None:
    kind, options, group, message = ADDED[name]
    runs = []
    for adds in (True, False):
        model = compiled(NET)
        matrices, others = ([p for p in model.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
        optimizer = model.optimizer(kind, matrices, lr=1e-3, **options)
        losses = Loop(steps=1).run(NET, model, optimizer)
        if adds:
            with pytest.raises((ArgumentError, StateError), match=message):
                optimizer.add_param_group({"params": others, **group})
            assert len(optimizer.param_groups) == 1
        runs.append([*losses, *Loop(steps=2).run(NET, model, optimizer, start=1), *values(model, optimizer)])
    assert equal(*runs)


def test_a_group_that_needs_no_memory_is_added_to_muon() -> None:
    model, source = compiled(NET), NET.seeded()
    (own, its), (matrices, others) = (
        [[p for p in each.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False)]
        for each in (model, source)
    )
    optimizer = model.optimizer(Muon, own, **MUON)
    Loop(steps=1).run(NET, model, optimizer)
    optimizer.add_param_group({"params": its, "kind": SGD, "lr": 1e-2})
    muons, sgd = Muon(matrices, **MUON), SGD(others, lr=1e-2, fused=True)
    Loop(steps=1).run(NET, source, muons)
    source.zero_grad()
    found = Loop(steps=2).run(NET, model, optimizer, start=1)
    assert torch.equal(torch.stack(found), torch.stack(Loop(steps=2).run(NET, source, Both(muons, sgd), start=1)))


def test_a_group_that_memory_was_planned_otherwise_for_is_refused() -> None:
    model = compiled(NET)
    *first, last = [p for p in model.parameters() if p.ndim == 2]
    optimizer = model.optimizer(Muon, first)
    with pytest.raises(StateError, match="a group of kind Muon was added, but"):
        optimizer.add_param_group({"params": [last]})
    assert len(optimizer.param_groups) == 1
