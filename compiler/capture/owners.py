"""Finds the objects whose attributes a function may read, such as a loss function outside of the model."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

Owners = Iterator[tuple[Any, str]]
"""Modules and objects of the user's, each with its full name."""
_DEEPEST = 4
_IMMUTABLE = 1 << 8
"""Py_TPFLAGS_IMMUTABLETYPE, set on classes written in C."""


def full_name(path: str, name: str) -> str:
    """The full name of attribute `name` of the module at `path`; "" is the whole model."""
    return f"{path}.{name}" if path else name


def owners_in(value: Any, path: str, depth: int = 0) -> Owners:
    """The modules and objects of a callable: the instance it is a method of, and recursively the callables it is made
    from or closes over. Functions found as globals are skipped: they would lead into torch, and all through it."""
    if isinstance(value, nn.Module):
        yield from ((module, f"{path}.{name}" if name else path) for name, module in value.named_modules())
        return
    inside: dict[str, Any] = {}
    if isinstance(value, MethodType):
        inside = {"__self__": value.__self__, "__func__": value.__func__}
    elif isinstance(value, functools.partial):
        inside = {"func": value.func, **{str(i): each for i, each in enumerate(value.args)}, **value.keywords}
    elif inspect.isfunction(value):
        inside = _named_in(value)
    elif _is_users(value):
        yield value, path
        inside = vars(value)
    for name, each in inside.items() if depth < _DEEPEST else ():
        if name == "__self__" or (callable(each) and not isinstance(each, type)):
            yield from owners_in(each, path if name == "__self__" else f"{path}.{name}", depth + 1)


def _named_in(function: FunctionType) -> dict[str, Any]:
    """The values a function refers to: globals other than routines, and closure variables that are set."""
    known, code = function.__globals__, function.__code__
    named = {name: known[name] for name in _globals_of(code) if name in known and not inspect.isroutine(known[name])}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # raised by an empty cell, on which inspect.getclosurevars fails, too
            named[name] = cell.cell_contents
    return named


def _globals_of(code: CodeType) -> Iterator[str]:
    """The names that a function and those defined within it, such as comprehensions, may look up as globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _is_users(value: Any) -> bool:
    """Whether the reads of an object's attributes can be recorded, that is, whether its class can be patched."""
    is_object = hasattr(value, "__dict__") and not (isinstance(value, type) or inspect.ismodule(value))
    return is_object and not type(value).__flags__ & _IMMUTABLE
