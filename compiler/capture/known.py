"""What values are known by: what is equal for those that a program may take for each other, however they were changed.

Containers and arrays are known by all that is in them, and objects by their attributes. Where those lead to other
objects, from the fourth in a row on, and to containers of many elements, these are known by their identity: a model
may hold all that trains it.
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
"""Values that hold no tensors and do not change."""
_UNCHANGING = frozenset(PLAIN) - {enum.Enum}
_SEQUENCES = (list, tuple, set, frozenset, deque)
_BYTES = (bytearray, array.array, numpy.generic, numpy.ndarray)
_NO_OBJECTS = (*PLAIN, Tensor, nn.Module, type, FunctionType, BuiltinFunctionType, PurePath)
"""What has attributes beside what it is: modules' own are guarded each, others' nothing guards."""
_MAKE_ALIKE: frozenset[Callable[..., Any]] = frozenset(kind.__new__ for kind in (object, *_SEQUENCES, dict))
_DEEPEST, _LONGEST = 3, 1000
_C_CLASS = 1 << 8
"""Py_TPFLAGS_IMMUTABLETYPE."""


class Same:
    """Equal to what holds the very same object, which it keeps alive: an identity is given anew to others."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def known_by(value: Any) -> Hashable:
    return Snapshot(value).known


class Snapshot:
    """A value as it is. That it has not changed since is told by the identities of what is in it, and only where these
    have by what it is known by. `within` are the objects and containers that led here."""

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
        self._may_change: bool = bool(self._changing) or isinstance(value, _BYTES)
        if self._contents is not None:
            self._may_change |= not isinstance(value, (tuple, frozenset, MethodType))

    @cached_property
    def known(self) -> Hashable:
        if self._contents is None:
            return self._alone
        known = (self._inside[i].known if i in self._inside else _known_alone(e) for i, e in enumerate(self._contents))
        is_set = isinstance(self._value, (set, frozenset))
        return type(self._value), _identity(self._value), frozenset(known) if is_set else tuple(known)

    def holds(self, now: Any) -> bool:
        """Whether a value may be taken for what this one was."""
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
    """What else tells a value from others, in a fixed order; None where nothing does."""
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
    """Names and values of an object's attributes, of its `__dict__` and `__slots__`."""
    kind: Any = type(value)
    slots = [name for name in _slots(kind) if hasattr(value, name)]
    own = getattr(value, "__dict__", None)
    if own is None and not slots:
        return None
    own = {} if own is value or not isinstance(own, dict) else own
    return [*own, *own.values(), *slots, *(getattr(value, name) for name in slots)]


@cache
def _slots(cls: type) -> tuple[str, ...]:
    """What the classes that are written in Python have slots for."""
    classes = [each for each in cls.__mro__ if not each.__flags__ & _C_CLASS]
    return tuple(
        name for each in classes for name, member in vars(each).items() if isinstance(member, MemberDescriptorType)
    )


def _identity(value: Any) -> Hashable:
    """Of an object that may have more to it than its attributes: it, or its class, is written in C, or makes it."""
    if isinstance(value, (MethodType, partial, tuple)) or type(value).__new__ in _MAKE_ALIKE:
        return None
    return Same(value)
