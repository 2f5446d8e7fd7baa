"""A loss that the model does not compute, given to compile: trained as plain PyTorch does, also through stages."""

import inspect
import weakref
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import GeminiError
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import LLAMA


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


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y) * self.weight


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        ("mse", "loss_fn='mse'; expected a function of what the model returns"),
        (lambda output: output.sum(), r"loss_fn takes \(output\); expected a function of what the model returns and"),
        (lambda output, *targets: output.sum(), r"loss_fn takes \(output, \*targets\); expected"),
        (Learned(), "loss_fn has parameters, which nobody would train; make it a part of the model"),
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
