"""Contents of the containers and objects that modules hold, restored after a forward has changed them.

A forward runs several times while it is captured. What it leaves in a list, a dict or an object, such as a counter,
must not be seen by the next run: the program would be that of a later call.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from .guards import INTERNAL

_DEEPEST, _LONGEST = 4, 1000
_OPAQUE = (Tensor, nn.Module, type, FunctionType, ModuleType)
_LIBRARIES = ("torch.", "transformers.", "accelerate.", "lightning.", "pytorch_lightning.")
"""Objects of their classes, such as a trainer, lead to a run's whole state, which is not the forward's."""


@dataclass(frozen=True)
class Contents:
    """The containers and objects of one module with copies of their contents, each under its name in the module."""

    held: tuple[tuple[str, Any, Any], ...]

    @classmethod
    def of(cls, module: nn.Module) -> "Contents":
        seen: set[int] = set()
        values = {name: value for name, value in vars(module).items() if name not in INTERNAL}
        return cls(tuple(each for name, value in values.items() for each in _walk(value, name, seen)))

    def replaced_tensor(self) -> str | None:
        """The name of a tensor in one of them that has been replaced by another value."""
        for label, value, before in self.held:
            now = _members(value)
            for key, old in _members(before).items():
                if isinstance(old, Tensor) and key in now and now[key] is not old:
                    return f"{label}.{key}" if _is_object(value) else f"{label}[{key!r}]"
        return None

    def restore(self) -> None:
        """Puts the contents back where they have changed."""
        for _, value, before in self.held:
            current = vars(value) if _is_object(value) else value
            if isinstance(current, set):
                if current != before:
                    current.clear()
                    current.update(before)
            elif not _same(_members(current), _members(before)):
                current.clear()
                current.update(before) if isinstance(current, dict) else current.extend(before)


def _walk(value: Any, label: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, Any, Any]]:
    if id(value) in seen or depth > _DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, list | tuple | deque | dict | set) and len(value) <= _LONGEST:
        if not isinstance(value, tuple):
            yield label, value, value.copy()
        for key, each in _members(value).items():
            yield from _walk(each, f"{label}[{key!r}]", seen, depth + 1)
    elif _is_object(value):
        yield label, value, dict(vars(value))
        for name, each in vars(value).items():
            if not _is_object(each):
                yield from _walk(each, f"{label}.{name}", seen, depth + 1)


def _is_object(value: Any) -> bool:
    """Whether a value is an object of a user's class, whose state is its attributes."""
    if isinstance(value, (*_OPAQUE, list, tuple, deque, dict, set)) or not hasattr(value, "__dict__"):
        return False
    return not f"{type(value).__module__}.".startswith(_LIBRARIES)


def _members(value: Any) -> Mapping[Any, Any]:
    """The elements of a container by key or index, or the attributes of an object; sets have none to tell apart."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple | deque):
        return dict(enumerate(value))
    return {} if isinstance(value, set) else vars(value)


def _same(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    return list(now) == list(before) and all(now[key] is before[key] for key in before)
