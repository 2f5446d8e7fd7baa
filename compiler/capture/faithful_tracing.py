"""Operators that a trace would turn into something else than they are in eager mode: random draws in place, whose
functional forms differ, draws from generators of a model's own, and checks of results, which a trace may lose."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...runtime.isa import draws  # noqa: F401  (the operator)
from ...runtime.isa.errors import CaptureError
from ...runtime.isa.torch_private import TorchDispatchMode, is_torchs_generator

_aten = torch.ops.aten


class FaithfulTracing(TorchDispatchMode):
    """Intercepts these operators while a forward is traced."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and is_torchs_generator(generator):
            kwargs = {**kwargs, "generator": None}
        elif generator is not None:
            raise CaptureError(
                "the model draws from a torch.Generator of its own, whose state a program could not follow; draw from "
                "torch's own generator, or pass what is drawn to the model"
            )
        return _TRACED.get(func, func)(*args, **kwargs)


def _bernoulli_(tensor: Tensor, p: float = 0.5, generator: None = None) -> Tensor:
    """`Tensor.bernoulli_`, which in-place dropout and alpha dropout call, too. Its functional form always draws in
    contiguous order, so tensors of other strides take an operator of ours."""
    if tensor.is_contiguous():
        return tensor.bernoulli_(p)
    return tensor.copy_(torch.ops.geminifx.bernoulli_like.default(tensor, p))


def _random_(tensor: Tensor, low: int, high: int | None, generator: None = None) -> Tensor:
    """The `Tensor.random_` overload with two bounds: its functional form has a Python keyword, `from`, for a name."""
    if high is None:
        raise CaptureError("random_(low, None) cannot be captured; pass both ends of the range, or use randint")
    return tensor.random_(high - low).add_(low)


def _check_errors(info: Tensor, name: str, *, is_matrix: bool) -> NoReturn:
    """`torch.linalg`'s check whether a matrix could be factorised, whatever function asks for it."""
    raise CaptureError(
        f"{name} raises where its result would be wrong, which a program cannot do; use its form that does not, "
        "such as torch.linalg.inv_ex, solve_ex or cholesky_ex, and look at the info that it returns"
    )


_TRACED: Mapping[Any, Callable[..., Tensor]] = {
    _aten.bernoulli_.float: _bernoulli_,
    getattr(_aten.random_, "from"): _random_,
    _aten._linalg_check_errors.default: _check_errors,
}
