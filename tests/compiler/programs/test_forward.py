"""A forward that is put in the model's place: a method is compiled, a function runs around what is compiled."""

import inspect
import re
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import StateError
from torch import Tensor, nn
from zoo import GPT2, VOCAB, compiled, tokens


def scaled(model: nn.Module, scale: float) -> None:
    """A new forward, as tools write them: it calls the old one, and reads the model's modules."""
    old = model.forward

    @wraps(type(model).forward)
    def forward(self: Any, *args: Any, head: bool = False, **kwargs: Any) -> dict[str, Tensor]:
        found = old(*args, **kwargs)
        return {"loss": scale * found["loss"] + (self.lm_head.weight.square().sum() if head else 0.0)}

    model.forward = MethodType(forward, model)


def check_equal(model: Any, plain: Any, **given: Any) -> None:
    for each in (model, plain):
        each.zero_grad()
        each(**tokens(), **given)["loss"].backward()
    assert torch.equal(model(**tokens(), **given)["loss"], plain(**tokens(), **given)["loss"])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_method_in_the_place_of_the_forward_is_compiled() -> None:
    plain, model = GPT2.seeded(), compiled(GPT2)
    check_equal(model, plain)
    old, signature = model.forward, inspect.signature(model.forward)
    for steps, scale in ((4, 2.0), (8, 3.0)):  # the second calls the first
        scaled(plain, scale), scaled(model, scale)
        check_equal(model, plain)
        check_equal(model, plain, head=True)
        assert model.stats.steps == 2 + steps
    assert inspect.signature(model.forward) == signature
    assert torch.equal(old(**tokens()).loss, GPT2.seeded()(**tokens()).loss), "as it was when it was read"
    model.forward = old
    check_equal(model, GPT2.seeded())


def test_a_method_is_divided_into_microbatches_when_it_does_not_run() -> None:
    """As a plan for another optimizer does."""
    plain, model = GPT2.seeded(), compiled(GPT2, microbatches=2)
    scaled(plain, 2.0), scaled(model, 2.0)
    losses = [each(**tokens(4))["loss"] for each in (plain, model)]
    assert model.session.last["training"].captured.by(4).program.inputs("input")
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
    losses.append(model(**tokens(4))["loss"])
    losses[-1].backward()
    optimizer.step()
    assert model.plan.microbatches == 2
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=2**-20, atol=0)


def test_what_a_method_takes_is_its_own_where_it_says_so() -> None:
    def forward(self: Any, ids: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.transformer(ids).last_hidden_state

    model, plain = geminifx.compile(GPT2.seeded()), GPT2.seeded()
    for each in (model, plain):
        each.forward = MethodType(forward, each)
    ids = tokens()["input_ids"]
    assert torch.equal(model(ids, scale=2.0), plain(ids, scale=2.0)) and model.stats.steps == 1
    assert list(inspect.signature(model.forward).parameters) == ["ids", "scale"]


def telling(model: nn.Module, name: str) -> None:
    """A new forward that tells, besides the loss, what a loss of the caller's is made of."""

    def forward(self: Any, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.lm_head(self.transformer(input_ids).last_hidden_state)
        chosen = logits.log_softmax(-1).gather(-1, labels[..., None])
        return {"loss": -chosen.mean(), name: chosen}

    model.forward = MethodType(forward, model)


def test_outputs_of_a_method_that_returns_no_logits_all_have_gradients() -> None:
    plain, model = GPT2.seeded(), compiled(GPT2)
    for each in (plain, model):
        telling(each, "log_probs")
        each(**tokens())["log_probs"].square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    telling(model, "logits")
    with pytest.raises(StateError, match=re.escape("outputs='all'")):
        model(**tokens())["logits"].sum().backward()


def test_generation_runs_the_new_forward() -> None:
    def loud(model: nn.Module) -> None:
        old = model.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = old(*args, **kwargs)
            return type(found)(logits=-found.logits, past_key_values=found.past_key_values)

        model.forward = MethodType(wraps(type(model).forward)(forward), model)

    plain, model = GPT2.seeded().eval(), geminifx.compile(GPT2.seeded().eval())
    given = {"inputs": tokens()["input_ids"], "max_new_tokens": 3, "do_sample": False, "eos_token_id": VOCAB}
    before = plain.generate(**given)
    loud(plain), loud(model)
    expected = plain.generate(**given)
    assert torch.equal(model.generate(**given), expected) and not torch.equal(before, expected)


def test_a_function_in_the_place_of_the_forward_runs_around_it() -> None:
    """As accelerate's, which converts what comes out."""
    seen = []

    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["labels"])
            return forward(*args, **kwargs)

        return call

    model = compiled(GPT2)
    model.forward = around(model.forward)
    for _ in range(2):
        assert torch.equal(model(**tokens()).loss, GPT2.seeded()(**tokens()).loss)
    assert len(seen) == 2 and model.stats.steps == 2


def test_a_module_whose_forward_is_replaced_is_compiled_anew() -> None:
    """As tools do that patch a layer."""

    def doubled(self: Any, x: Tensor) -> Tensor:
        return 2 * type(self).forward(self, x)

    plain, model = GPT2.seeded(), compiled(GPT2)
    check_equal(model, plain)
    for each in (plain, model):
        layer = each.transformer.h[0].mlp
        layer.forward = MethodType(doubled, layer)
    check_equal(model, plain)
    for each in (plain, model):
        del each.transformer.h[0].mlp.forward
    check_equal(model, plain)


def test_a_part_whose_forward_is_wrapped_is_compiled_with_what_wraps_it() -> None:
    """By a function around the forward that it finds, as hooks of tools are."""
    plain, model = GPT2.seeded(), compiled(GPT2)
    for each in (plain, model):
        layer = each.transformer.h[0].mlp
        old = layer.forward
        layer.forward = lambda x, old=old: 2 * old(x)
    check_equal(model, plain)
    hidden = torch.ones(1, 1, 32)
    assert torch.equal(model.transformer.h[0].mlp(hidden), plain.transformer.h[0].mlp(hidden))
    for each in (plain, model):
        del each.transformer.h[0].mlp.forward
    check_equal(model, plain)
