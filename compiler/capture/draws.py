"""Random numbers that a forward draws in place are the same in the program, where torch's functional forms differ."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...runtime.isa import draws  # noqa: F401  (the operator)
from ...runtime.isa.errors import CaptureError
from ...runtime.isa.torch_private import TorchDispatchMode

_aten = torch.ops.aten


class SameDraws(TorchDispatchMode):
    """While a forward runs that is traced."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = _DRAWS.get(func)
        if drawn is None or (kwargs or {}).get("generator") is not None:
            return func(*args, **kwargs or {})
        return drawn(*args, **kwargs or {})


def _bernoulli_(tensor: Tensor, p: float = 0.5, generator: None = None) -> Tensor:
    """`Tensor.bernoulli_`, which dropout in place and alpha dropout call, too: its functional form draws for a
    contiguous tensor."""
    if tensor.is_contiguous():
        return tensor.bernoulli_(p)
    return tensor.copy_(torch.ops.geminifx.bernoulli_like.default(tensor, p))


def _random_(tensor: Tensor, low: int, high: int | None, generator: None = None) -> Tensor:
    """`Tensor.random_` of two arguments, whose functional form has a name that is a keyword of Python's."""
    if high is None:
        raise CaptureError("random_(low, None) cannot be captured; give it both ends of the range, or use randint")
    return tensor.random_(high - low).add_(low)


_DRAWS: Mapping[Any, Callable[..., Tensor]] = {
    _aten.bernoulli_.float: _bernoulli_,
    getattr(_aten.random_, "from"): _random_,
}
