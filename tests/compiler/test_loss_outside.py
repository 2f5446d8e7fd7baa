"""A loss that the model does not compute, given to compile: trained as plain PyTorch does, also through stages."""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import GeminiError
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import LLAMA

pytestmark = pytest.mark.usefixtures("shared")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x)) + x
        return x * scale


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator), torch.randint(4, (8,), generator=generator)


def error(output: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
    return F.cross_entropy(output, y) * weight


ONE_DEVICE = {"parallel": {"pipeline": {"ranks": 1, "stages": 4}}}


@pytest.mark.parametrize("options", [{}, {"microbatches": 4}, {**ONE_DEVICE, "microbatches": 4}], ids=str)
def test_it_trains_as_plain_pytorch(options: dict[str, Any]) -> None:
    plain, model = network(), geminifx.compile(network(), loss_fn=error, **options)
    optimizer, ours = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, model))
    for step in range(3):
        x, y = batch(step)
        loss, expected = model(x, y=y, weight=0.5), error(plain(x), y, weight=0.5)
        torch.testing.assert_close(loss, expected)
        for each in (loss, expected):
            each.backward()
        for each in (optimizer, ours):
            each.step()
            each.zero_grad()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_without_its_arguments_the_model_is_as_it_was() -> None:
    model, (x, y) = geminifx.compile(network(), loss_fn=nn.CrossEntropyLoss(), example_inputs=(batch(0)[0],)), batch(0)
    with torch.no_grad():
        assert torch.equal(model(x, scale=2.0), network()(x, scale=2.0))
        assert torch.equal(model(x, target=y), F.cross_entropy(network()(x), y))
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale", "target"]


def test_tools_read_its_arguments_off_the_models_signature() -> None:
    model, (x, y) = geminifx.compile(network(), loss_fn=error), batch(0)
    expected = ["x", "scale", "y", "weight"]
    for function in (model, model.forward):
        assert list(inspect.signature(function).parameters) == expected
    compiled = model.forward
    model.forward = functools.wraps(compiled)(lambda *args, **kwargs: compiled(*args, **kwargs))
    assert list(inspect.signature(model.forward).parameters) == expected
    del model.forward  # as tools do that take their wrapper off again
    assert list(inspect.signature(model.forward).parameters) == expected
    assert torch.equal(model(x, y=y), error(network()(x), y))


def test_a_model_that_has_a_loss_may_be_given_another() -> None:
    """Of labels that both know the given one reads them."""

    def last(output: Any, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(output.logits[:, -1], labels[:, -1]), "logits": output.logits}

    given, plain = LLAMA.batch(batch=4), LLAMA.seeded()
    model = geminifx.compile(LLAMA.seeded(), loss_fn=last, example_inputs=given, microbatches=2)
    found, expected = model(**given)["loss"], last(plain(input_ids=given["input_ids"]), given["labels"])["loss"]
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class Weighted(nn.Module):
    """A loss that has all kinds of state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(4))
        self.entropy, self.scale = nn.CrossEntropyLoss(label_smoothing=0.1), 1.0
        self.seen: list[int] = []

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return self.entropy(output * self.weight, y) * self.scale * (1.0 if self.training else 3.0)


class Plain:
    """An object that is called, and is no module."""

    def __init__(self, inner: nn.Module) -> None:
        self.inner, self.factor = inner, 1.0

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return self.inner(output, y) * self.factor


def closing(loss: nn.Module) -> Any:
    return lambda output, y: loss(output, y)


def closing_over_nothing(loss: nn.Module) -> Any:
    """Over a variable that has no value, besides."""
    if not isinstance(loss, nn.Module):
        unset = None
    return lambda output, y: loss(output, y) if isinstance(output, Tensor) else unset


def partial(loss: nn.Module) -> Any:
    return functools.partial(lambda output, inner, y: inner(output, y), inner=loss)


def nested(loss: nn.Module) -> Any:
    """The global is read in a function within the one that is given, as a comprehension is on Python 3.11."""
    globals()["_global_loss"] = loss

    def outer(output: Tensor, y: Tensor) -> Tensor:
        def inner() -> Tensor:
            return _global_loss(output, y)  # type: ignore[name-defined]  # noqa: F821

        return inner()

    return outer


GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda loss: loss,
    "its method": lambda loss: loss.forward,
    "a closure": closing,
    "a closure over an unset variable": closing_over_nothing,
    "an object": Plain,
    "an object's method": lambda loss: Plain(loss).__call__,
    "a partial": partial,
    "a global of an inner function": nested,
}
CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda loss: setattr(loss, "scale", 2.0),
    "a part's attribute": lambda loss: setattr(loss.entropy, "label_smoothing", 0.5),
    "a part": lambda loss: setattr(loss, "entropy", nn.CrossEntropyLoss()),
    "a buffer": lambda loss: setattr(loss, "weight", torch.full((4,), 2.0)),
    "a buffer's values": lambda loss: loss.weight.fill_(2.0),
    "its mode": lambda loss: loss.eval(),
    "a forward": lambda loss: setattr(loss.entropy, "forward", lambda output, y: 2 * F.cross_entropy(output, y)),
    "a hook": lambda loss: loss.entropy.register_forward_hook(lambda _, given, found: 2 * found),
}


def check_changed(given: str, change: Callable[[Any], Any]) -> None:
    loss, (x, y) = Weighted(), batch(0)
    model, plain = geminifx.compile(network(), loss_fn=GIVEN[given](loss)), network()
    before = model(x, y=y)
    assert torch.equal(before, loss(plain(x), y))
    change(loss)
    for _ in range(2):
        now, expected = model(x, y=y), loss(plain(x), y)
        assert torch.equal(now, expected) and not torch.equal(now, before)


@pytest.mark.parametrize("change", CHANGES)
def test_what_it_reads_of_itself_is_followed(change: str) -> None:
    check_changed("itself", CHANGES[change])


@pytest.mark.parametrize("given", GIVEN)
def test_whatever_leads_to_the_module_that_computes_it_is_followed(given: str) -> None:
    check_changed(given, CHANGES["a part's attribute"])


def test_what_it_reads_of_an_object_is_followed() -> None:
    loss, (x, y) = Plain(nn.CrossEntropyLoss()), batch(0)
    model, plain = geminifx.compile(network(), loss_fn=loss), network()
    for loss.factor in (1.0, 2.0):
        assert torch.equal(model(x, y=y), loss(plain(x), y))


def test_what_it_does_not_read_makes_no_program(captures: list[bool]) -> None:
    loss, (x, y) = Weighted(), batch(0)
    model = geminifx.compile(network(), loss_fn=loss)
    for step in range(3):
        model(x, y=y)
        loss.seen.append(step)
    assert len(captures) == 1


def test_a_method_of_the_model_may_be_it(captures: list[bool]) -> None:
    class Own(Network):
        scale = 1.0

        def error(self, output: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(output, y) * self.scale

    source, plain, (x, y) = Own(), network(), batch(0)
    source.load_state_dict(plain.state_dict())
    model = geminifx.compile(source, loss_fn=source.error)
    for scale in (1.0, 1.0, 2.0, 2.0):
        source.scale = scale
        torch.testing.assert_close(model(x, y=y), F.cross_entropy(plain(x), y) * scale)
    assert len(captures) == 2


def test_of_what_it_needs_none_is_not_given() -> None:
    model, (x, y) = geminifx.compile(network(), loss_fn=error), batch(0)
    output = network()(x)
    for given in ({"y": None}, {"y": None, "weight": 0.5}):
        assert torch.equal(model(x, **given), output)

    def masked(output: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        found = F.cross_entropy(output, y, reduction="none")
        return (found if mask is None else found * mask).mean()

    model = geminifx.compile(network(), loss_fn=masked)
    assert torch.equal(model(x, y=y, mask=None), masked(output, y, None))
    assert torch.equal(model(x, y=None, mask=None), output)
    with pytest.raises(TypeError, match="mask"):
        model(x, y=y)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y) * self.weight


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        ("mse", "loss_fn='mse'; expected a function of the model's output"),
        (lambda output: output.sum(), r"loss_fn takes \(output\); expected a function of the model's output and"),
        (lambda output, *targets: output.sum(), r"loss_fn takes \(output, \*targets\); expected"),
        (Learned(), "loss_fn has parameters, which would not be trained; make it a part of the model"),
    ],
)
def test_what_is_no_loss_function_is_refused(loss_fn: Any, message: str) -> None:
    with pytest.raises(GeminiError, match=message):
        geminifx.compile(network(), loss_fn=loss_fn)


def test_it_keeps_no_model_alive(without_garbage_collection: None) -> None:
    model, (x, y) = geminifx.compile(network(), loss_fn=error), batch(0)
    model(x, y=y).backward()
    held = [weakref.ref(each) for each in (model, model.source, model.session)]
    del model
    assert [one() for one in held] == [None] * 3


def test_an_argument_of_neither_is_refused() -> None:
    x, y = batch(0)
    with pytest.raises(GeminiError, match=r"example_inputs: .*'labels'; expected the arguments of Network\.forward"):
        geminifx.compile(network(), loss_fn=error, example_inputs={"x": x, "labels": y})
