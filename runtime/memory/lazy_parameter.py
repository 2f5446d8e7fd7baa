"""Parameters whose masters lie in training states: they look like float32 tensors and are materialized when read."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..isa.errors import StateError
from ..isa.torch_private import plain_results, wrapper_parameter


class Source(Protocol):
    """Where a lazy parameter's values come from."""

    @property
    def name(self) -> str:
        """The parameter's name, for messages."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """The master's dtype."""

    @property
    def elsewhere(self) -> str:
        """For messages: which parts of the parameter other processes hold and this one lacks; "" if it is whole."""

    def read(self) -> Tensor:
        """A copy of the master."""

    @property
    def is_writable(self) -> bool:
        """Whether the parameter may be written to now."""

    def write(self, value: Tensor) -> None:
        """Sets the master. Raises StateError if it may not be written."""

    def refused(self, by: str) -> StateError:
        """The error to raise where `by`, such as an operator's name, may not write to the parameter."""

    def gradient(self) -> Tensor | None:
        """The gradient, as a tensor that may be changed in place; None if there is none."""

    def set_gradient(self, value: Tensor | None) -> None:
        """Replaces the gradient; None drops it."""


class LazyParameter(nn.Parameter):
    """A parameter of a compiled model that `model.optimizer(...)` trains.

    Every read materializes its float32 master. Writing to it or to a view of it raises StateError, and so does stepping
    another optimizer over it; the compiled model's `load_state_dict` sets it, and so do in-place operators while its
    source is writable. Its device is the CPU, wherever the master lies, because that is where reads put the values.
    """

    source: Source

    def __new__(cls, source: Source, requires_grad: bool) -> "LazyParameter":
        strides = torch.empty(source.shape, device="meta").stride()
        parameter = wrapper_parameter(cls, source.shape, strides, source.dtype, requires_grad)
        parameter.source = source
        return parameter

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, LazyParameter) and value.source is self.source:  # the last step of `p.data += x`
            return
        if not self.source.is_writable:
            raise self.source.refused("its .data")
        self.source.write(_built(value))

    @property
    def grad(self) -> Tensor | None:
        return self.source.gradient()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.source.set_gradient(value)

    @grad.deleter
    def grad(self) -> None:
        self.source.set_gradient(None)

    def numpy(self, *, force: bool = False) -> Any:
        return _array(self.source.read(), self.requires_grad, force)

    def tolist(self) -> Any:
        return self.source.read().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return LazyParameter(args[0].source, False)
        first = args[0] if args else None
        if isinstance(first, LazyParameter) and _writes_to_first_alone(func) and first.source.is_writable:
            if func is torch.ops.aten.copy_.default:  # does not read the old value, of which others may hold parts
                first.source.write(_built(args[1]).expand(first.shape))
                return first
            value = first.source.read()
            func(value, *pytree.tree_map(_built, args[1:]), **pytree.tree_map(_built, kwargs or {}))
            first.source.write(value)
            return first
        return _run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyParameter {self.source.name}: {self.source.read()!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.source.read().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        return memo.setdefault(id(self), nn.Parameter(self.source.read(), self.requires_grad))


class Gradient(Tensor):
    """A gradient that may be changed in place. Assigning its `.data` copies into it, because nothing else would keep
    the assigned tensor. Operators on it return plain tensors."""

    __torch_function__ = plain_results

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            self.copy_(value)


class UsedUpGradient(Tensor):
    """Stands for a gradient that an update has consumed: it is not None, but any use of it raises."""

    error: StateError

    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, error: StateError) -> "UsedUpGradient":
        gradient = wrapper_parameter(cls, shape, torch.empty(shape, device="meta").stride(), dtype, False)
        gradient.error = error
        return gradient

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise next(leaf.error for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, UsedUpGradient))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return "<gradient, consumed in the backward>"


class _View(Tensor):
    """A copy, or a view of one. Writes would be lost in the copy, so they raise the error that `refusal` makes."""

    values: Tensor
    refusal: Callable[[str], StateError]

    def __new__(cls, values: Tensor, refusal: Callable[[str], StateError]) -> "_View":
        view = wrapper_parameter(cls, tuple(values.shape), values.stride(), values.dtype, False)
        view.values, view.refusal = values, refusal
        return view

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise self.refusal("its .data")

    def numpy(self, *, force: bool = False) -> Any:
        return _array(self.values, self.requires_grad, force)

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.values)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values.__reduce_ex__(protocol)


def refuse_gradient(gradient: Tensor) -> None:
    """The hook of lazy parameters: raises, because autograd would put the gradient where no step ever looks."""
    raise StateError(
        "a gradient reached a parameter from outside the compiled model, for example from a penalty on weights; "
        "model.optimizer(...) would not see it. Compute such a loss inside the model's forward, or detach the "
        "parameter"
    )


OWN_HOOKS = [refuse_gradient]
"""The hooks of lazy parameters that nobody else gave one."""


def become_lazy(parameter: nn.Parameter, source: Source) -> None:
    """Makes a parameter read from `source`, or from another source than before, perhaps in another dtype; the object
    and its hooks stay the same."""
    if isinstance(parameter, LazyParameter) and parameter.dtype == source.dtype:
        parameter.source = source
        return
    trained, hooks = parameter.requires_grad, None
    takes_gradients = source.dtype.is_floating_point
    if isinstance(parameter, LazyParameter):
        hooks, parameter._backward_hooks = parameter._backward_hooks, None
    torch.utils.swap_tensors(parameter, LazyParameter(source, takes_gradients))
    if hooks is not None:
        parameter._backward_hooks = hooks  # autograd forgets them in the swap
    elif takes_gradients:
        parameter.register_hook(refuse_gradient)
    parameter.requires_grad_(trained)


def hooked(parameters: Mapping[str, nn.Parameter]) -> Iterator[str]:
    """The names of parameters that carry autograd hooks, which a compiled step does not call."""
    for name, parameter in parameters.items():
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
            if hooks and [*hooks.values()] != OWN_HOOKS:
                yield name


def gathered_gradient(values: Tensor, name: str) -> Tensor:
    """A gathered copy of the gradient of a parameter that several processes share; writes to it raise."""
    return _View(values, partial(_gradient_refusal, name))


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operator on the values of lazy parameters and their views. Raises StateError if it writes to one."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found = _refusal_of(args[i] if i < len(args) else kwargs.get(argument.name))
            if found is not None:
                raise found(str(func))
    refusal = _refusal_of((args, kwargs))
    result = func(*pytree.tree_map(_built, args), **pytree.tree_map(_built, kwargs))
    if not func.is_view:
        return result
    return pytree.tree_map_only(Tensor, lambda tensor: _View(tensor, refusal), result)


def _writes_to_first_alone(func: Any) -> bool:
    written = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return written == [0]


def _array(values: Tensor, requires_grad: bool, force: bool) -> Any:
    """Tensor.numpy for a tensor that requires gradients or not; the array is read-only."""
    array = values.detach().requires_grad_(requires_grad).numpy(force=force)
    array.setflags(write=False)
    return array


def _gradient_refusal(name: str, by: str) -> StateError:
    return StateError(
        f"the gradient of {name} cannot be written by {by}: each process has a shard of it, and reading it gives a "
        "gathered copy. Assign a new gradient to .grad; to clip, pass max_grad_norm= to model.optimizer(...)"
    )


def _built(value: Any) -> Any:
    if isinstance(value, LazyParameter):
        return value.source.read()
    return value.values if isinstance(value, _View) else value


def _refusal_of(value: Any) -> Any:
    """What makes the error for writes to the first lazy parameter or view in `value`; None if there is none."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, LazyParameter):
            return leaf.source.refused
        if isinstance(leaf, _View):
            return leaf.refusal
    return None
