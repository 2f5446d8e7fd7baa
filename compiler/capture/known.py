"""Keys of Python values, equal for values that a program may take for each other, however they came to be so.

The key of a container or an array covers all its elements, that of an object its attributes. Objects nested more than
three deep, and their containers of many elements, are keyed by identity: a model may hold everything that trains it.
"""

import array
import enum
import inspect
from collections import deque
from collections.abc import Callable, Hashable
from functools import cache, cached_property, partial
from operator import is_
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
"""Types of immutable values that hold no tensors."""
_UNCHANGING = frozenset(PLAIN) - {enum.Enum}
_SEQUENCES = (list, tuple, set, frozenset, deque)
_BYTES = (bytearray, array.array, numpy.generic, numpy.ndarray)
_NO_OBJECTS = (*PLAIN, Tensor, nn.Module, type, FunctionType, BuiltinFunctionType, PurePath)
"""Types not keyed by their attributes: a module's are guarded one by one, the others' by nothing."""
_MAKE_ALIKE: frozenset[Callable[..., Any]] = frozenset(kind.__new__ for kind in (object, *_SEQUENCES, dict))
_DEEPEST, _LONGEST = 3, 1000
_C_CLASS = 1 << 8
"""Py_TPFLAGS_IMMUTABLETYPE."""


class Same:
    """Compares by identity, and keeps the object alive so that its id is not reused."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def known_by(value: Any) -> Hashable:
    """A key that is equal for two values if a program may take one for the other."""
    return Snapshot(value).known


class Snapshot:
    """A value as it is now, to be compared with what it is later. Identities of its contents are compared first, which
    is cheap in every call, and keys only where these differ. `within` are the objects and containers around it."""

    def __init__(self, value: Any, within: tuple[Any, ...] = ()) -> None:
        self._value, self._within = value, within
        self._contents = _contents(value, within)
        self._alone = _known_alone(value) if self._contents is None else None
        self._inside = {
            i: Snapshot(each, (*within, value))
            for i, each in enumerate(self._contents or ())
            if type(each) not in _UNCHANGING
        }
        self._changing = [(i, inside) for i, inside in self._inside.items() if inside._may_change]
        is_mutable = self._contents is not None and not isinstance(value, (tuple, frozenset, MethodType))
        self._may_change: bool = bool(self._changing) or is_mutable or isinstance(value, _BYTES)

    @cached_property
    def known(self) -> Hashable:
        if self._contents is None:
            return self._alone
        known = (self._inside[i].known if i in self._inside else _known_alone(e) for i, e in enumerate(self._contents))
        is_set = isinstance(self._value, (set, frozenset))
        return type(self._value), _identity(self._value), frozenset(known) if is_set else tuple(known)

    def holds(self, now: Any) -> bool:
        """Whether a program may take the value `now` for this one."""
        if now is self._value and (not self._may_change or self._is_untouched()):
            return True
        return Snapshot(now, self._within).known == self.known

    def _is_untouched(self) -> bool:
        if self._contents is None:
            return False
        contents = _contents(self._value, self._within)
        if contents is None or len(contents) != len(self._contents) or not all(map(is_, contents, self._contents)):
            return False
        return all(inside.holds(contents[i]) for i, inside in self._changing)


def _known_alone(value: Any) -> Hashable:
    if isinstance(value, (*PLAIN, PurePath)):
        return type(value), repr(value)  # 1, 1.0 and True differ, and NaN equals itself
    if isinstance(value, bytearray):
        return bytearray, bytes(value)
    if isinstance(value, array.array):
        return array.array, value.typecode, value.tobytes()
    if isinstance(value, (numpy.generic, numpy.ndarray)):
        told = repr(value.tolist()) if value.dtype.hasobject else value.tobytes()
        return type(value), str(value.dtype), value.shape, told
    return Same(value)


def _contents(value: Any, within: tuple[Any, ...]) -> list[Any] | None:
    """The values that a value consists of, in a fixed order; None if it is keyed as a whole."""
    if isinstance(value, (*_NO_OBJECTS, *_BYTES)) or any(value is outer for outer in within):
        return None
    depth = sum(not isinstance(outer, (*_SEQUENCES, dict)) for outer in within)
    if depth >= _DEEPEST or inspect.ismodule(value) or (isinstance(value, PreTrainedConfig) and not within):
        return None
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    attributes = _attributes(value)
    if not isinstance(value, (*_SEQUENCES, dict)):
        return attributes
    if depth and len(value) > _LONGEST:
        return None
    elements = [*value, *value.values()] if isinstance(value, dict) else [*value]
    return elements if attributes is None else [*elements, *attributes]


def _attributes(value: Any) -> list[Any] | None:
    """The names and values of an object's attributes, in `__dict__` and `__slots__`; None if it has neither."""
    kind: Any = type(value)
    slots = [name for name in _slots(kind) if hasattr(value, name)]
    own = getattr(value, "__dict__", None)
    if own is None and not slots:
        return None
    own = {} if own is value or not isinstance(own, dict) else own
    return [*own, *own.values(), *slots, *(getattr(value, name) for name in slots)]


@cache
def _slots(cls: type) -> tuple[str, ...]:
    """The names of a class's slots, except those of classes written in C."""
    classes = [each for each in cls.__mro__ if not each.__flags__ & _C_CLASS]
    return tuple(
        name for each in classes for name, member in vars(each).items() if isinstance(member, MemberDescriptorType)
    )


def _identity(value: Any) -> Hashable:
    """The object itself if it may hold more than its attributes: its class is written in C or has its own `__new__`."""
    if isinstance(value, (MethodType, partial, tuple)) or type(value).__new__ in _MAKE_ALIKE:
        return None
    return Same(value)
