"""Guards: what a program was captured from besides parameters, buffers and arguments, such as numbers and functions.

A forward reads these from its modules and their configurations, and they are baked into the program. Every attribute
that is read during the trace becomes a guard, and a program is reused as long as its guards hold; the idea is
torch.compile's. What nothing reads, such as a history that a training loop keeps on the model, guards nothing.

A loss function given to compile stands outside of the model: everything read from its modules and objects is a guard,
including modes, buffers and hooks, which for the model's own modules are part of a call's key.
"""

import enum
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .owners import full_name, owners_in

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
"""Types of immutable values that hold no tensors."""
_CONTAINERS = (list, tuple, set, frozenset, dict)
INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that nn.Module itself keeps on a module."""
_ABSENT = object()
_LONGEST, _DEEPEST = 64, 4
"""Containers with more elements, and values nested deeper, are compared by identity."""


class _Same:
    """Compares by identity, and keeps the object alive so that its id is not reused."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def known_by(value: Any, depth: int = 0) -> Hashable:
    """A key that is equal for two values if a program may take one for the other."""
    if isinstance(value, PLAIN):
        return type(value), repr(value)  # 1, 1.0 and True differ, and NaN equals itself
    if isinstance(value, numpy.generic):
        return type(value), repr(value.item())
    if isinstance(value, MethodType):
        return MethodType, _Same(value.__func__), _Same(value.__self__)
    if depth < _DEEPEST:
        inside = functools.partial(known_by, depth=depth + 1)
        if isinstance(value, _CONTAINERS) and len(value) <= _LONGEST:
            elements = [each for pair in value.items() for each in pair] if isinstance(value, dict) else value
            return type(value), tuple(map(inside, elements))
        if isinstance(value, functools.partial):
            return functools.partial, inside(value.func), inside(value.args), inside(value.keywords)
        if _is_settings(value):
            return type(value), inside(vars(value))
    return _Same(value)


def _is_settings(value: Any) -> bool:
    """Whether an object is compared by its attributes: a namespace, or a non-callable object of a user's class."""
    if callable(value) or isinstance(value, (Tensor, nn.Module, PreTrainedConfig)):
        return False
    return hasattr(value, "__dict__") and not inspect.ismodule(value)


def forwards_of(modules: Iterable[nn.Module]) -> tuple[tuple[int, Hashable], ...]:
    """The positions of the modules that have a forward assigned on the instance, each with a key of that forward."""
    return tuple((place, known_by(vars(m)["forward"])) for place, m in enumerate(modules) if "forward" in vars(m))


def attributes_of(module: nn.Module) -> dict[str, Hashable]:
    """A module's attributes, except nn.Module's own, by name as `known_by` keys."""
    return {name: known_by(value) for name, value in vars(module).items() if name not in INTERNAL}


@dataclass(frozen=True)
class Guard:
    """The value an attribute had during the trace; `label` is the attribute's full name."""

    owner: Any
    name: str
    label: str
    value: Any
    known: Hashable
    by_identity: bool

    @classmethod
    def of(cls, owner: Any, name: str, path: str) -> "Guard":
        value = vars(owner).get(name, _ABSENT)
        by_identity = not (isinstance(value, _CONTAINERS) or _is_settings(value))
        return cls(owner, name, full_name(path, name), value, known_by(value), by_identity)

    def holds(self) -> bool:
        now = vars(self.owner).get(self.name, _ABSENT)
        return (self.by_identity and now is self.value) or known_by(now) == self.known


@contextmanager
def recorded(copies: nn.Module, originals: nn.Module, loss_fn: Callable[..., Any] | None) -> Iterator[list[Guard]]:
    """While open, records what is read from `copies`, the model that is traced. On leaving, fills the yielded list with
    a guard on `originals` for each read. Also covers the objects `loss_fn` is made of, which are not copied."""
    owners = _owners_of(copies, originals)
    beside = {id(owner): (owner, path) for owner, path in owners_in(loss_fn, "loss_fn")}
    owners |= beside
    outside = beside.keys() - set(map(id, originals.modules()))  # loss_fn may be a method of the model
    reads: dict[tuple[int, str], None] = {}
    guards: list[Guard] = []

    def recording(cls: type) -> Any:
        plain: Any = cls.__getattribute__

        def read(self: Any, name: str) -> Any:
            if id(self) in owners and not _is_private(self, name, id(self) in outside):
                reads[id(self), name] = None
            return plain(self, name)

        return mock.patch.object(cls, "__getattribute__", read)

    classes = {type(owner) for owner, _ in beside.values() if not isinstance(owner, nn.Module)}
    with ExitStack() as stack:
        for cls in {nn.Module, PreTrainedConfig, *classes}:
            stack.enter_context(recording(cls))
        yield guards
    guarded = {(identity, _keeper(owners[identity][0], name, identity in outside)): None for identity, name in reads}
    for identity, name in guarded:
        owner, path = owners[identity]
        if name in vars(owner) or _is_missing(owner, name) or (name == "forward" and identity in outside):
            guards.append(Guard.of(owner, name, path))


def _owners_of(copies: nn.Module, originals: nn.Module) -> dict[int, tuple[Any, str]]:
    """Maps the id of each copied module and configuration to its original and full name."""
    owners: dict[int, tuple[Any, str]] = {}
    for (path, copied), original in zip(copies.named_modules(), originals.modules(), strict=True):
        owners[id(copied)] = original, path
        _add_configs(owners, vars(copied).get("config"), vars(original).get("config"), path)
    return owners


def _keeper(owner: Any, name: str, is_outside: bool) -> str:
    """The entry of vars(owner) that holds `name`; for modules outside of the model it may be `_buffers` or the like."""
    if is_outside and isinstance(owner, nn.Module):
        for held in ("_parameters", "_buffers", "_modules"):
            if name in vars(owner)[held]:
                return held
    return str(getattr(type(owner), "attribute_map", {}).get(name, name))


def _is_private(owner: Any, name: str, is_outside: bool) -> bool:
    """Whether reads of an attribute need no guard: Python's dunder names; within the model, nn.Module's own attributes
    and the underscored ones of torch's modules, which follow from their constructor arguments."""
    if name.startswith("__") or is_outside:
        return name.startswith("__")
    return name in INTERNAL or (name.startswith("_") and type(owner).__module__.startswith("torch.nn."))


def _add_configs(owners: dict[int, tuple[Any, str]], copied: Any, original: Any, path: str) -> None:
    if isinstance(copied, PreTrainedConfig) and id(copied) not in owners:
        path = full_name(path, "config")
        owners[id(copied)] = original, path
        for name, part in list(vars(copied).items()):
            _add_configs(owners, part, vars(original).get(name), path)


def _is_missing(owner: Any, name: str) -> bool:
    """Whether neither the instance nor its class has an attribute that was asked for: it may be set later."""
    if isinstance(owner, nn.Module) and any(
        name in held for held in (owner._parameters, owner._buffers, owner._modules)
    ):
        return False
    found = inspect.getattr_static(type(owner), name, _ABSENT)
    return not callable(found) and not hasattr(found, "__get__")
