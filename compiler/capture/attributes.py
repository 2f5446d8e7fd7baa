"""What a forward may read of modules besides parameters and buffers: numbers, strings, switches, functions, tensors,
and containers of these.

They are baked into a program as they were when it was captured, so programs are known by them.
"""

import enum
from collections.abc import Hashable, Iterator
from dataclasses import is_dataclass
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
_BY_IDENTITY = (FunctionType, BuiltinFunctionType, type, Tensor)
"""Tensors that are no buffers are constants of a program, which computes with them as they are then."""
_CONTAINERS = (list, tuple, set, frozenset, dict)
_INTERNAL = frozenset(vars(nn.Module()))
_LONGEST = 64
"""Containers with more elements are data and not switches."""
_UNKNOWN = object()


def attributes_of(owner: Any) -> dict[str, Hashable]:
    """The plain attributes of a module or configuration, by name, as values that can be compared."""
    found = {name: _key(value) for name, value in vars(owner).items() if name not in _INTERNAL}
    return {name: key for name, key in found.items() if key is not _UNKNOWN}


def _key(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return (type(value), repr(value))  # 1, 1.0 and True differ, and NaN equals itself
    if isinstance(value, _BY_IDENTITY):
        return (type(value), id(value))
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and hasattr(value, "__dict__")):
        return (type(value), _key(vars(value)))
    if not isinstance(value, _CONTAINERS):
        return _UNKNOWN
    if len(value) > _LONGEST:
        return (type(value), len(value))
    elements = [element for pair in value.items() for element in pair] if isinstance(value, dict) else value
    keys = ((_key(element), type(element)) for element in elements)
    return (type(value), tuple(kind if key is _UNKNOWN else key for key, kind in keys))


class Switches:
    """The plain attributes of all modules of a model, and of their configurations, as one number that changes when
    one of them does.

    Thousands are looked at in every call, so that what has the identity that it had is not looked at further.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._numbers: dict[Hashable, int] = {}
        self._number = -1
        self._modules: list[int] = []
        self._owners: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._same: list[tuple[dict[str, Any], str, Any]] = []
        self._equal: list[tuple[dict[str, Any], str, Hashable]] = []

    def number(self) -> int:
        if self._number < 0 or not self._unchanged():
            self._look()
        return self._number

    def changed(self, before: dict[str, Hashable]) -> list[str]:
        """The names of attributes that are not as `named()` had them before."""
        now = self.named()
        return [name for name in {**before, **now} if before.get(name) != now.get(name)]

    def named(self) -> dict[str, Hashable]:
        return {f"{path}.{name}" if path else name: key for path, owner in self._all()
                for name, key in {"its class": type(owner), **attributes_of(owner)}.items()}  # fmt: skip

    def _all(self) -> Iterator[tuple[str, Any]]:
        met: set[int] = set()
        for path, module in self.model.named_modules():
            yield path, module
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and id(config) not in met:
                met.add(id(config))
                yield f"{path}.config" if path else "config", config

    def _unchanged(self) -> bool:
        if self._modules != list(map(id, self.model.modules())):
            return False
        if any(len(owner) != size for owner, size in zip(self._owners, self._sizes, strict=True)):
            return False
        if any(owner.get(name, _UNKNOWN) is not value for owner, name, value in self._same):
            return False
        return all(_key(owner.get(name)) == key for owner, name, key in self._equal)

    def _look(self) -> None:
        self._modules = list(map(id, self.model.modules()))
        self._owners = [vars(owner) for _, owner in self._all()]
        self._sizes = list(map(len, self._owners))
        self._same, self._equal = [], []
        for owner in self._owners:
            for name, value in owner.items():
                if name in _INTERNAL:
                    continue
                if isinstance(value, (*_PLAIN, *_BY_IDENTITY)):
                    self._same.append((owner, name, value))
                elif (key := _key(value)) is not _UNKNOWN:
                    self._equal.append((owner, name, key))
        state = tuple(self.named().items())
        self._number = self._numbers.setdefault(state, len(self._numbers))
