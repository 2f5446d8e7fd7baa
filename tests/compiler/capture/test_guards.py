"""A program is used as long as what was read of the model's modules, when it was captured, is as it was."""

import argparse
import array
import copy
import functools
import gc
import math
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import geminifx
import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig


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


class Scales:
    """An object of the user's that is called."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale


class Slotted:
    __slots__ = ("__scale", "other")

    def __init__(self) -> None:
        self.__scale = 2.0

    def times(self, x: Tensor, scale: float | None = None) -> Tensor:
        self.__scale = self.__scale if scale is None else scale
        return x * self.__scale


class Settings(dict[str, float]):
    scale = 2.0


class RaisedError(Exception):
    """Of a class that is written in C, so that its attributes are not all there is to it."""

    scale = 2.0


# What the model holds, what its forward makes of it, and what changes it in place.
HELD: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    "a long list": (lambda: [2.0] * 2000, lambda h, x: x * h[999], lambda h: h.__setitem__(999, 5.0)),
    "a long dict": (lambda: dict.fromkeys(range(2000), 2.0), lambda h, x: x * h[999], lambda h: h.update({999: 5.0})),
    "a list in lists": (lambda: [[[[[[2.0]]]]]], lambda h, x: x * h[0][0][0][0][0][0],
                        lambda h: h[0][0][0][0][0].__setitem__(0, 5.0)),
    "a set": (lambda: {2.0}, lambda h, x: x * sum(h), lambda h: h.add(5.0)),
    "a queue": (lambda: deque([2.0]), lambda h, x: x * h[0], lambda h: h.appendleft(5.0)),
    "zero's sign": (lambda: [0.0], lambda h, x: x + torch.copysign(x, torch.tensor(h[0])),
                    lambda h: h.__setitem__(0, -0.0)),
    "an array": (lambda: numpy.array([2.0, 3.0]), lambda h, x: x * float(h[0]), lambda h: h.__setitem__(0, 5.0)),
    "an array of objects": (lambda: numpy.array([2.0, "a"], dtype=object), lambda h, x: x * h[0],
                            lambda h: h.__setitem__(0, 5.0)),
    "an array in a list": (lambda: [numpy.array([2.0])], lambda h, x: x * float(h[0][0]),
                           lambda h: h[0].__setitem__(0, 5.0)),
    "Python's array": (lambda: array.array("d", [2.0]), lambda h, x: x * h[0], lambda h: h.__setitem__(0, 5.0)),
    "bytes that change": (lambda: bytearray(b"2"), lambda h, x: x * int(h), lambda h: h.__setitem__(0, ord("5"))),
    "what is called": (lambda: Scales(2.0), lambda h, x: h(x), lambda h: setattr(h, "scale", 5.0)),
    "a method's object": (lambda: Scales(2.0).__call__, lambda h, x: h(x),
                          lambda h: setattr(h.__self__, "scale", 5.0)),
    "objects in a list": (lambda: [Scales(2.0)], lambda h, x: h[0](x), lambda h: setattr(h[0], "scale", 5.0)),
    "slots": (Slotted, lambda h, x: h.times(x), lambda h: h.times(X, 5.0)),
    "a slot that was empty": (Slotted, lambda h, x: x * getattr(h, "other", 2.0), lambda h: setattr(h, "other", 5.0)),
    "a dict's attribute": (Settings, lambda h, x: x * h.scale, lambda h: setattr(h, "scale", 5.0)),
    "of a class written in C": (RaisedError, lambda h, x: x * h.scale, lambda h: setattr(h, "scale", 5.0)),
    "three objects deep": (lambda: SimpleNamespace(a=SimpleNamespace(a=Scales(2.0))), lambda h, x: h.a.a(x),
                           lambda h: setattr(h.a.a, "scale", 5.0)),
    "a configuration": (lambda: LlamaConfig(rms_norm_eps=2.0), lambda h, x: x * h.rms_norm_eps,
                        lambda h: setattr(h, "rms_norm_eps", 5.0)),
    "a configuration in a dict": (lambda: {"a": LlamaConfig(rms_norm_eps=2.0)}, lambda h, x: x * h["a"].rms_norm_eps,
                                  lambda h: setattr(h["a"], "rms_norm_eps", 5.0)),
}  # fmt: skip


class Holds(nn.Module):
    def __init__(self, held: Any, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.held, self.use = held, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.held, x * self.weight)


@pytest.mark.parametrize("kind", HELD)
def test_what_is_changed_in_place_is_followed(kind: str, captures: list[bool]) -> None:
    make, use, change = HELD[kind]
    plain, source = Holds(make(), use), Holds(make(), use)
    model = geminifx.compile(source)
    first = model(X)
    assert torch.equal(first, plain(X)) and torch.equal(model(X), first) and len(captures) == 1
    for each in (plain, source):
        change(each.held)
    found = model(X)
    assert torch.equal(found, plain(X)) and not torch.equal(found, first) and len(captures) == 2


SAME: dict[str, Callable[[], Any]] = {
    "lists": lambda: [1.0, math.nan, {"a": (1, {2, 3})}],
    "arrays": lambda: numpy.arange(4.0),
    "objects": lambda: Scales(2.0),
    "namespaces": lambda: argparse.Namespace(a=Slotted()),
    "paths": lambda: [Path("a/b")],
}


@pytest.mark.parametrize("kind", SAME)
def test_what_is_replaced_by_its_like_makes_no_program(kind: str, captures: list[bool]) -> None:
    source = Holds(SAME[kind](), lambda held, x: x if held is None else x * 2)
    model = geminifx.compile(source)
    for _ in range(3):
        model(X)
        source.held = copy.deepcopy(source.held) if kind == "lists" else SAME[kind]()
    str(source.held)  # a path keeps what it is asked for
    model(X)
    assert len(captures) == 1


def test_an_object_of_a_class_written_in_c_is_known_by_its_identity_too(captures: list[bool]) -> None:
    source = Holds(random.Random(1), lambda held, x: x * held.random())
    model = geminifx.compile(source)
    first = model(X)
    source.held = random.Random(2)
    assert not torch.equal(model(X), first) and len(captures) == 2


@pytest.mark.slow
def test_a_function_that_gets_the_place_of_another_in_memory_is_no_other(captures: list[bool]) -> None:
    """Identities are given anew: what guards go by is kept."""
    model = geminifx.compile(Reads())
    for k in range(1, 30):
        model.source.act = times(k)
        with pytest.MonkeyPatch.context() as warned:
            warned.setattr("warnings.warn", lambda *_, **__: None)
            assert model(X)[0, 0].item() == k
        gc.collect(1)  # what a call leaves is young; what other tests left takes a second each time
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
