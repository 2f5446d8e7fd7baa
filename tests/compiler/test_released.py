"""What a compiled model held is free when it is gone, and nothing grows from shape to shape."""

import linecache
import weakref
from types import MethodType
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.programs.programs import Recent
from geminifx.runtime.isa.errors import BudgetError, StateError
from optimizing import NET, Loop, placed
from torch import Tensor, nn
from torch.optim import AdamW
from zoo import OPT


def network() -> nn.Module:
    layers = (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.1)) for _ in range(3))
    return nn.Sequential(*layers, nn.Linear(8, 3))


def batch(rows: int) -> Tensor:
    return torch.ones(rows, 8)


def texts() -> set[str]:
    return {name for name in linecache.cache if name.startswith("<geminifx ")}


def trained(model: geminifx.CompiledModule, optimizer: torch.optim.Optimizer, rows: int) -> None:
    model(batch(rows)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model(batch(rows))


def watched(model: geminifx.CompiledModule) -> list[weakref.ref[Any]]:
    """What holds memory: the storages of chunks, programs, and who has them."""
    session, store = model.session, model.session.machine.store
    tensors = [getattr(c, name) for c in session.machine.chunks for name in ("master", "gradient", "cast", "resident")]
    if session.setup.own is not None:
        tensors += [
            tensor for state in store.states for tensor in (state.weights, state.rest, *state.moments, state.total)
        ]
    programs = [program.executor for _, program in session._programs.items()]
    held = [session, session.machine, store, *programs]
    return [weakref.ref(one) for one in (*held, *(t.untyped_storage() for t in tensors if t is not None))]


@pytest.mark.parametrize("placement", ["cpu", "cuda"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_and_torchs_optimizer_are_freed_at_once(
    placement: Any, steps: int, without_garbage_collection: None
) -> None:
    before = texts()
    model = geminifx.compile(network(), placement=placement, example_inputs=(batch(4),))
    optimizer = AdamW(model.parameters())
    model.prepare(batch(4))
    for rows in range(4, 4 + steps):
        trained(model, optimizer, rows)
    held = watched(model)
    assert all(one() is not None for one in held) and texts() - before
    del model, optimizer
    assert [type(one()) for one in held if one() is not None] == [] and texts() == before


@pytest.mark.usefixtures("without_garbage_collection")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("where", ["device", "host", "streamed, resident"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["default", "in_backward"])
def test_a_model_and_its_own_optimizer_are_freed_at_once(in_backward: bool, where: str, accumulate: int) -> None:
    """Its parameters read from the store, the store updates by the optimizer, which asks the model for a plan."""
    before = texts()
    model = placed(NET, where)
    optimizer = model.optimizer(AdamW, lr=0.1, in_backward=in_backward, accumulate=accumulate)
    Loop(steps=2, micro=accumulate).run(NET, model, optimizer)
    optimizer.state_dict(), model.state_dict()
    held = watched(model)
    assert all(one() is not None for one in held)
    del model, optimizer
    assert [type(one()) for one in held if one() is not None] == [] and not texts() - before


@pytest.mark.usefixtures("without_garbage_collection")
def test_a_model_that_was_never_planned_is_freed_at_once() -> None:
    model = geminifx.compile(network())
    optimizer = model.optimizer(AdamW, lr=0.1)
    held = [weakref.ref(one) for one in (model.session, *(p.untyped_storage() for p in model.parameters()))]
    del model, optimizer
    assert [type(one()) for one in held if one() is not None] == []


@pytest.mark.usefixtures("without_garbage_collection")
@pytest.mark.parametrize("patched", [None, "function", "method"])
def test_a_part_that_was_called_or_patched_keeps_nothing(patched: str | None) -> None:
    model = geminifx.compile(network(), example_inputs=(batch(4),))
    optimizer = model.optimizer(AdamW, lr=0.1)
    if patched == "function":
        model[0].forward = nn.Identity()
    elif patched == "method":
        part = model[0]
        part.forward = MethodType(lambda self, x: self[0](x) + 1, part)
        del part
    with torch.no_grad():
        model[0](batch(4))
    trained(model, optimizer, 4)
    held = watched(model)
    del model, optimizer
    assert [type(one()) for one in held if one() is not None] == []


@pytest.mark.parametrize("examples", [None, (batch(4),)], ids=["before the plan", "behind it"])
def test_a_model_whose_optimizer_is_gone_says_so(examples: Any) -> None:
    model = geminifx.compile(network(), example_inputs=examples)
    model.optimizer(AdamW, lr=0.1, in_backward=True)
    for _ in range(2):
        with pytest.raises(StateError, match=r"returned was garbage-collected.* keep a reference"):
            model(batch(4)).sum().backward()


def test_parameters_outlive_the_compiled_model() -> None:
    source = network()
    model = geminifx.compile(source, example_inputs=(batch(4),))
    optimizer = model.optimizer(AdamW, lr=0.1)
    trained(model, optimizer, 4)
    expected = model.state_dict()
    del model, optimizer
    assert all(torch.equal(value, expected[name]) for name, value in source.state_dict().items())


def test_programs_of_many_shapes_are_freed_when_others_are_used(
    monkeypatch: pytest.MonkeyPatch, without_garbage_collection: None
) -> None:
    monkeypatch.setattr(Recent, "most", 3)
    before, programs = texts(), set[weakref.ref[Any]]()
    model = geminifx.compile(network(), example_inputs=(batch(4),))
    optimizer = AdamW(model.parameters())
    for rows in range(4, 8):
        trained(model, optimizer, rows)
        programs |= {weakref.ref(program.executor) for _, program in model.session._programs.items()}
    alive = [one for one in programs if one() is not None]
    assert len(programs) == 8 and len(alive) == len(texts() - before)
    # Three, and those that were last used in training and in evaluation, which the graph shows.
    assert len(model.session._programs) == 3 <= len(alive) <= 5
    assert len(model.session.captures.kept) == 3


def test_a_forward_that_is_kept_keeps_what_it_needs() -> None:
    model = geminifx.compile(network()).eval()
    forward, expected = model.forward, model(batch(2))
    del model
    assert torch.equal(forward(batch(2)), expected)


@pytest.mark.parametrize("spare", [1.0, 1.1])
def test_what_the_first_call_returns_is_freed_although_its_plan_was_refused_for_the_whole_batch(
    spare: float, without_garbage_collection: None
) -> None:
    """A refusal that is kept would hold the frames that it came through, and these what they hold."""
    given = OPT.batch(batch=8)
    with pytest.raises(BudgetError) as refused:
        geminifx.compile(OPT.seeded(), device_budget=1, example_inputs=given)
    assert refused.value.smallest_bytes is not None
    model = geminifx.compile(OPT.seeded(), device_budget=int(refused.value.smallest_bytes * spare))
    loss = weakref.ref(model(**given).loss)
    assert model.plan.microbatches > 1 and loss() is None
