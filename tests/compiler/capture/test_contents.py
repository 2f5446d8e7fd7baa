"""What a forward leaves in lists, dicts and objects that modules hold: each run of a capture begins like the call."""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import CaptureError
from torch import Tensor, nn


class Holds(nn.Module):
    """A linear layer whose output is scaled by what `scale` makes of `held`."""

    def __init__(self, held: Any, scale: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.held, self.scale = nn.Linear(4, 4), held, scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * self.scale(self.held, y)


def counted(held: Any, _: Tensor) -> int:
    held[0] += 1
    return held[0]


def logged(held: Any, _: Tensor) -> int:
    held.append(1)
    return len(held)


def marked(held: set[int], _: Tensor) -> int:
    held.add(len(held))
    return len(held)


def stepped(held: Any, _: Tensor) -> int:
    held.n += 1
    return held.n


def nested(held: dict[str, Any], _: Tensor) -> int:
    held["log"].append(1)
    return len(held["log"])


def cached(held: dict[int, Tensor], y: Tensor) -> Tensor:
    if len(y) not in held:
        held[len(y)] = torch.arange(4.0)
    return held[len(y)]


def collected(held: list[Tensor], y: Tensor) -> Tensor:
    held.append(y.square().mean())
    total = sum(held)
    held.clear()
    return total


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "a counter in a list": (lambda: [0], counted),
    "a counter in a dict": (lambda: {0: 0}, counted),
    "a list": (list, logged),
    "a deque": (deque, logged),
    "a set": (set, marked),
    "an object": (lambda: SimpleNamespace(n=0), stepped),
    "a list in a dict": (lambda: {"log": []}, nested),
    "a list in a tuple": (lambda: ([],), lambda held, y: logged(held[0], y)),
    "a list in an object": (lambda: SimpleNamespace(log=[]), lambda held, y: logged(held.log, y)),
    "a cache of tensors": (dict, cached),
    "losses that are collected": (list, collected),
}


@pytest.mark.filterwarnings("ignore:the forward assigns held")
@pytest.mark.parametrize("how", HELD)
def test_a_capture_computes_the_first_call_and_leaves_what_is_held(how: str) -> None:
    make, scale = HELD[how]
    plain, source, x = Holds(make(), scale), Holds(make(), scale), torch.randn(3, 4)
    model = geminifx.compile(source)
    found, expected = model(x).square().sum(), plain(x).square().sum()
    assert torch.equal(found, expected)
    found.backward()
    expected.backward()
    assert torch.equal(model.layer.weight.grad, plain.layer.weight.grad)
    assert repr(source.held) == repr(make())


def test_what_is_left_is_told() -> None:
    with pytest.warns(UserWarning, match="the forward assigns held, but compiled steps do not repeat such assignments"):
        geminifx.compile(Holds([0], counted))(torch.ones(3, 4))


def replaced_in_dict(held: dict[str, Tensor], _: Tensor) -> Tensor:
    held["t"] = held["t"] + 1
    return held["t"]


def replaced_in_object(held: Any, _: Tensor) -> Tensor:
    held.t = held.t + 1
    return held.t


@pytest.mark.parametrize(
    ("make", "scale", "name"),
    [
        (lambda: {"t": torch.ones(4)}, replaced_in_dict, r"held\['t'\]"),
        (lambda: SimpleNamespace(t=torch.ones(4)), replaced_in_object, r"held\.t"),
    ],
)
def test_a_tensor_that_is_replaced_is_refused(make: Any, scale: Any, name: str) -> None:
    source = Holds(make(), scale)
    with pytest.raises(CaptureError, match=f"replaces the tensor {name}, .*register_buffer"):
        geminifx.compile(source)(torch.ones(3, 4))
    assert repr(source.held) == repr(make())
