"""A program is used as long as what was read of the model's modules, when it was captured, is as it was."""

import argparse
import functools
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import geminifx
import pytest
import torch
from torch import Tensor, nn


class Reads(nn.Module):
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.act: Callable[[Tensor], Tensor] = times(1)
        self.history: list[Any] = []
        self.args, self.part = argparse.Namespace(k=1), functools.partial(torch.mul, other=1.0)
        self.method = self.once

    def once(self, x: Tensor) -> Tensor:
        return x

    def twice(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.method(self.part(self.act(x * self.weight))) * self.gain * self.args.k


def times(k: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * k


X = torch.ones(2, 4)


WRITES: dict[str, Callable[[nn.Module, int], Any]] = {
    "a list grows": lambda m, i: m.history.append(i),
    "a tensor is kept": lambda m, i: setattr(m, "last", torch.ones(i + 1)),
    "steps are counted": lambda m, i: setattr(m, "global_step", i),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_no_forward_reads_makes_no_program(write: str, captures: list[bool]) -> None:
    model = geminifx.compile(Reads())
    for step in range(4):
        model(X)
        WRITES[write](model.source, step)
    assert len(captures) == 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a class's attribute, of the object": lambda m: setattr(m, "gain", 10),
    "a namespace's": lambda m: setattr(m.args, "k", 10),
    "a partial": lambda m: setattr(m, "part", functools.partial(torch.mul, other=10.0)),
    "a bound method": lambda m: setattr(m, "method", m.twice),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("through", [False, True], ids=["of the source", "of the compiled model"])
def test_what_the_forward_reads_is_followed(change: str, through: bool) -> None:
    plain, model = Reads(), geminifx.compile(Reads())
    assert torch.equal(model(X), plain(X))
    CHANGES[change](plain)
    CHANGES[change](model if through else model.source)
    assert torch.equal(model(X), plain(X)) and not torch.equal(plain(X), X)


@pytest.mark.slow
def test_a_function_that_gets_the_place_of_another_in_memory_is_no_other(captures: list[bool]) -> None:
    """Identities are given anew: what guards go by is kept."""
    model = geminifx.compile(Reads())
    for k in range(1, 30):
        model.source.act = times(k)
        with pytest.MonkeyPatch.context() as warned:
            warned.setattr("warnings.warn", lambda *_, **__: None)
            assert model(X)[0, 0].item() == k
        gc.collect()
    assert len(captures) == 29


def test_an_attribute_that_leads_back_to_itself_is_no_trouble() -> None:
    class Loops(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.loop.k

    source = Loops()
    source.loop = SimpleNamespace(k=2)
    source.loop.loop = source.loop
    model = geminifx.compile(source)
    assert model(X)[0, 0].item() == 2
    source.loop.k = 3
    assert model(X)[0, 0].item() == 3
