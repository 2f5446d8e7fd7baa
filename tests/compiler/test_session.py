"""What a model is set up with: when it is captured and planned, by what, and what a further program may change."""

from dataclasses import replace

import geminifx
import pytest
import torch
from geminifx.compiler.programs import builder
from geminifx.compiler.programs.programs import Recent
from geminifx.compiler.setup import LEGAL, Phase, move
from geminifx.runtime.isa.errors import BudgetError, IllegalTransition, StateError
from optimizing import ADAMW, NET, Loop, plain, same_moments, same_weights
from torch.optim import AdamW
from zoo import OPT, compiled


def test_a_hugging_face_model_is_captured_once_for_the_batch_that_comes(captures: list[bool]) -> None:
    """Not for a guess first: with the model's own optimizer, made before the batch, too."""
    for optimizer in (None, AdamW):
        captures.clear()
        model = geminifx.compile(OPT.seeded())
        optim = model.optimizer(optimizer, lr=1e-2) if optimizer else AdamW(model.parameters(), lr=1e-2)
        assert captures == []
        for _ in range(2):
            OPT.loss(model, OPT.batch()).backward()
            optim.step()
            optim.zero_grad()
        assert len(captures) == 1 and model.plan.format.beside is (optimizer is not None)


def test_its_plan_is_made_by_a_guess_where_somebody_asks(captures: list[bool]) -> None:
    model = geminifx.compile(OPT.seeded())
    assert model.plan.layout.chunks and "training" in model.graph and len(captures) == 1
    with pytest.raises(BudgetError, match="too small"):
        _ = geminifx.compile(OPT.seeded(), device_budget=1000).plan
    with pytest.raises(ValueError, match="does not fit this model"):
        geminifx.compile(OPT.seeded(), plan=compiled(NET).plan)


def test_an_optimizer_made_before_the_first_call_updates_from_it_on() -> None:
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    model = geminifx.compile(NET.seeded())
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1])
    assert optimizer.step() is None and optimizer.state_dict() == {**expected.state_dict(), "state": {}} | {
        "param_groups": optimizer.state_dict()["param_groups"]
    }
    optimizer.load_state_dict(expected.state_dict())  # there is none yet
    with pytest.raises(StateError, match="there is no plan yet"):
        optimizer.load_state_dict({**expected.state_dict(), "state": {0: {"step": torch.tensor(1.0)}}})
    with pytest.raises(StateError, match="was called before"):
        model.optimizer(AdamW)
    Loop().run(NET, reference, expected)
    Loop().run(NET, model, optimizer)
    assert same_weights(model, reference) and same_moments(optimizer, expected)


def test_an_evaluation_replaces_no_plan_no_machine_and_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(NET)
    before = model.session.setup
    x = next(iter(NET.batch(batch=64).values()))
    with torch.no_grad():
        model.eval()(x)
    assert model.session.setup is before
    decide = model.session.planning.decide

    def refused(*args: object) -> object:
        solution, _ = decide(*args)  # type: ignore[arg-type]
        return solution, BudgetError("no room for a torch optimizer", smallest_bytes=1)

    monkeypatch.setattr(model.session.planning, "decide", refused)
    with torch.no_grad():
        model(x[:3])
    assert model.session.setup is before
    NET.loss(model.train(), NET.batch()).backward()


def test_a_plan_that_fails_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(NET)
    before, graph = model.session.setup, model.graph
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no code"):
        patch.setattr(builder, "generate", lambda program: (_ for _ in ()).throw(RuntimeError("no code")))
        model.optimizer(AdamW)
    assert model.session.setup is before and model.graph == graph and model.session.phase is Phase.PLANNED
    reference, expected = plain(NET, AdamW)
    Loop(steps=2).run(NET, reference, expected)
    Loop(steps=2).run(NET, model, model.optimizer(AdamW))
    assert same_weights(model, reference)


def test_programs_that_were_called_long_ago_are_made_again(
    monkeypatch: pytest.MonkeyPatch, captures: list[bool]
) -> None:
    monkeypatch.setattr(Recent, "most", 2)
    model = geminifx.compile(NET.seeded())
    x = next(iter(NET.batch(batch=8).values()))
    with torch.no_grad():
        found = [model(x[:rows]) for rows in (1, 2, 3, 1, 3)]
    assert len(captures) == 4 and len(model.session._programs) == 2
    assert torch.equal(found[0], found[3]) and torch.equal(found[2], found[4])


def test_what_was_used_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recent, "most", 2)
    recent: Recent[str] = Recent()
    for key in "abac":
        if (key,) not in recent:
            recent[(key,)] = key.upper()
        assert recent[(key,)] == key.upper()
    assert recent.items() == [(("a",), "A"), (("c",), "C")] and len(recent) == 2


def test_phases_go_no_other_way() -> None:
    for now in Phase:
        for then in Phase:
            if then in LEGAL[now]:
                assert move(now, then) is then
            else:
                with pytest.raises(IllegalTransition, match=f"from {now.name} to {then.name}"):
                    move(now, then)


def test_a_setup_is_replaced_as_a_whole() -> None:
    setup = compiled(NET).session.setup
    with pytest.raises(AttributeError):
        setup.plan = replace(setup.plan, prefetch=0)  # type: ignore[misc, union-attr]
