"""Parameters whose masters lie in training states: they look like float32 tensors and are built when read."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import StateError
from .torch_private import wrapper_parameter


class Source(Protocol):
    """Where a lazy parameter's values come from."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The master, in a tensor of its own."""

    def write(self, value: Tensor) -> None:
        """Set the master. Raises StateError where it may not be written."""

    def gradient(self) -> Tensor | None:
        """The gradient, as a tensor that may be changed in place."""

    def set_gradient(self, value: Tensor | None) -> None:
        """Replace the gradient."""


class LazyParameter(nn.Parameter):
    """A parameter of a compiled model that `model.optimizer(...)` trains.

    Reading it builds its float32 master anew; writing to it raises StateError, and so does stepping another
    optimizer over it. `load_state_dict` of the compiled model is what sets it. It reports the CPU as its
    device, wherever its master lies, because that is where it is read to.
    """

    source: Source

    def __new__(cls, source: Source, requires_grad: bool) -> "LazyParameter":
        parameter = wrapper_parameter(cls, source.shape, source.dtype, requires_grad)
        parameter.source = source
        return parameter

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return self.source.gradient()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.source.set_gradient(value)

    @grad.deleter
    def grad(self) -> None:
        self.source.set_gradient(None)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return LazyParameter(args[0].source, False)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], LazyParameter):
            args[0].source.write(_built(args[1]))
            return args[0]
        written = _written(func, args, kwargs or {})
        if written is not None:
            raise StateError(
                f"parameter {written.source.name} was to be written by {func}; model.optimizer(...) keeps the masters, "
                "and what is read of them is a copy. Set values with model.load_state_dict(...), and step the optimizer "
                "that model.optimizer(...) returned"
            )
        args, kwargs = pytree.tree_map(_built, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyParameter {self.source.name}: {self.source.read()!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.source.read().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        return memo.setdefault(id(self), nn.Parameter(self.source.read(), self.requires_grad))


def _built(value: Any) -> Any:
    return value.source.read() if isinstance(value, LazyParameter) else value


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyParameter | None:
    """The lazy parameter that an operator writes to, if there is one."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, LazyParameter)]
            if found:
                return found[0]
    return None
