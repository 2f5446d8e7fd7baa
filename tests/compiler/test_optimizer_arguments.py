"""What model.optimizer takes, and what is left where something goes wrong: nothing that is half old and half new."""

from copy import deepcopy
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import ArgumentError, StateError
from shared_captures import shared_captures
from torch import Tensor, nn

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.AdamW, {"lr": 1e-2}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)


def batch(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(number)).to(dtype)


def compiled(dtype: torch.dtype = torch.float32, **options: Any) -> geminifx.CompiledModule:
    with shared_captures():
        return geminifx.compile(net(dtype), example_inputs=(batch(0, dtype),), **options)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    model(batch(number)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("placement", ["cuda", "cpu"])
@pytest.mark.parametrize(("kind", "hyper"), KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_float64_is_clipped_in_float64(placement: str, kind: Any, hyper: dict[str, Any], accumulate: int) -> None:
    plain, model = net(torch.float64), compiled(torch.float64, placement=placement)
    theirs = kind(plain.parameters(), **hyper)
    ours = model.optimizer(kind, max_grad_norm=0.1, accumulate=accumulate, **hyper)
    for number in range(3):
        for each in range(accumulate):
            for trained in (plain, model):
                trained(batch(accumulate * number + each, torch.float64)).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        for optimizer in (theirs, ours):
            optimizer.step()
            optimizer.zero_grad()
        assert ours.grad_norm.dtype == torch.float64
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-14, atol=0)
    for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), expected.detach(), rtol=1e-13, atol=1e-16)


def test_float64_is_clipped_by_the_model_too() -> None:
    plain, model = net(torch.float64), compiled(torch.float64)
    ours = model.optimizer(torch.optim.SGD, lr=0.1)
    for trained in (plain, model):
        trained(batch(0, torch.float64)).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.testing.assert_close(model.clip_grad_norm_(0.1), expected, rtol=1e-14, atol=0)
    ours.step()


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("kind", "hyper"), KINDS)
def test_groups_that_make_no_sense_are_told_before_anything_is_updated(
    in_backward: bool, kind: Any, hyper: dict[str, Any]
) -> None:
    model, other = compiled(), compiled()
    optimizers = [each.optimizer(kind, in_backward=in_backward, **hyper) for each in (model, other)]
    optimizer = optimizers[0]
    for name, value in {"lr": "fast", "weight_decay": None, "betas": 3, "momentum": torch.ones(2)}.items():
        if name not in optimizer.param_groups[0]:
            continue
        before, kept = weights(model), optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = value
        with pytest.raises(ArgumentError, match=f"{name}=.*; expected"):
            step(model, optimizer)
        assert all(map(torch.equal, weights(model), before))
        optimizer.param_groups[0][name] = kept
        optimizer.zero_grad()
        for trained, its in zip((model, other), optimizers, strict=True):
            step(trained, its)
        assert all(map(torch.equal, weights(model), weights(other)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_backward_that_fails_before_its_first_update_may_come_again(
    accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = (compiled(placement="cpu") for _ in range(2))
    ours, theirs = (
        each.optimizer(torch.optim.AdamW, lr=0.1, in_backward=True, accumulate=accumulate) for each in (model, other)
    )
    held = model.session.store().held
    with monkeypatch.context() as patch:
        for name in ("hold", "add"):
            patch.setattr(held, name, lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            model(batch(0)).sum().backward()
    ours.zero_grad()
    for trained, optimizer in ((model, ours), (other, theirs)):
        for number in range(2 * accumulate):
            trained(batch(number)).square().sum().backward()
            if number % accumulate == accumulate - 1:
                optimizer.step()
    assert all(map(torch.equal, weights(model), weights(other)))


@pytest.mark.parametrize("route", ["torch's", "ours", "in backward"])
def test_gradients_of_a_part_of_a_backward_are_not_added_to(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is taken again behind a failure would count twice: steps go on from zero_grad()."""
    model, other = (compiled(placement="cpu") for _ in range(2))

    def optimizer_of(trained: geminifx.CompiledModule) -> torch.optim.Optimizer:
        if route == "torch's":
            return torch.optim.AdamW(trained.parameters(), lr=0.1, fused=True)
        return trained.optimizer(torch.optim.AdamW, lr=0.1, in_backward=route == "in backward", accumulate=3)

    ours, theirs = map(optimizer_of, (model, other))
    backward = lambda trained, number: trained(batch(number)).square().sum().backward()  # noqa: E731
    backward(model, 0)
    called = model.session.last["training"].executor.called
    with monkeypatch.context() as patch:
        done = called.accumulate_grad

        def interrupted(*args: Any) -> None:
            done(*args)
            raise KeyboardInterrupt

        patch.setattr(called, "accumulate_grad", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backward(model, 1)
    for _ in range(2):
        with pytest.raises(StateError, match=r"call zero_grad\(\), and repeat the step"):
            backward(model, 1)
    ours.zero_grad(set_to_none=route != "torch's")
    for trained, optimizer in ((model, ours), (other, theirs)):
        for number in range(3):
            backward(trained, number)
        optimizer.step()
    assert all(map(torch.equal, weights(model), weights(other)))


def test_a_backward_that_fails_in_the_middle_of_its_updates_is_told_by_all_that_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = compiled(placement="cpu")
    optimizer = model.optimizer(torch.optim.AdamW, lr=0.1, in_backward=True)
    updater = model.session.store().updater
    with monkeypatch.context() as patch:
        patch.setattr(updater, "update", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            model(batch(0)).sum().backward()
    for follows in (optimizer.zero_grad, optimizer.step, lambda: model(batch(0))):
        with pytest.raises(StateError, match="failed after some parameters were updated"):
            follows()


@pytest.mark.parametrize(("kind", "hyper"), KINDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float64])
def test_saved_moments_of_another_dtype_are_converted_as_torch_converts_them(
    kind: Any, hyper: dict[str, Any], dtype: torch.dtype
) -> None:
    plain, model = net(), compiled()
    reference, optimizer = kind(plain.parameters(), **hyper), model.optimizer(kind, **hyper)
    step(plain, reference)
    step(model, optimizer)
    saved = deepcopy(reference.state_dict())
    for values in saved["state"].values():
        for name in {*values} - {"step"}:
            values[name] = (100 * values[name]).to(dtype)
    for each in (reference, optimizer):
        each.load_state_dict(deepcopy(saved))
    found, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
    for number, values in expected.items():
        for name, value in values.items():
            assert torch.equal(found[number][name], value) and found[number][name].dtype == value.dtype


@pytest.mark.parametrize(("kind", "option", "hyper"), [
    (torch.optim.SGD, "nesterov", {"momentum": 0.9}), (torch.optim.Adam, "decoupled_weight_decay", {}),
    (torch.optim.AdamW, "maximize", {}),
])  # fmt: skip
def test_an_option_that_a_saved_group_lacks_is_filled_in_as_torch_fills_it_in(
    kind: Any, option: str, hyper: dict[str, Any]
) -> None:
    plain, model = net(), compiled()
    reference, optimizer = kind(plain.parameters(), lr=0.1, **hyper), model.optimizer(kind, lr=0.1, **hyper)
    step(plain, reference)
    step(model, optimizer)
    saved = deepcopy(reference.state_dict())
    del saved["param_groups"][0][option]
    for each in (reference, optimizer):
        each.load_state_dict(deepcopy(saved))
    assert optimizer.param_groups[0][option] is reference.param_groups[0][option]
    step(model, optimizer, 1)


def test_an_option_that_torch_would_miss_in_the_step_is_missed_on_loading() -> None:
    model = compiled()
    optimizer = model.optimizer(torch.optim.Muon, [p for p in model.parameters() if p.ndim == 2])
    step(model, optimizer)
    saved = deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["nesterov"]
    with pytest.raises(ValueError, match=r"no 'nesterov', which torch\.optim\.Muon needs"):
        optimizer.load_state_dict(saved)
    step(model, optimizer, 1)


@pytest.mark.parametrize("given", [3, None, {"state": {}}, {"state": {}, "param_groups": [3]}, {"param_groups": []}])
def test_a_state_dict_that_is_none_changes_nothing(given: Any) -> None:
    model = compiled()
    optimizer = model.optimizer(torch.optim.AdamW, lr=0.1)
    step(model, optimizer)
    with pytest.raises(ArgumentError, match="state_dict"):
        optimizer.load_state_dict(given)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = "fast"
    with pytest.raises(ArgumentError, match="lr='fast'; expected"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1
    step(model, optimizer)
