"""Shortens a model's lists of blocks: of equal blocks one is captured, and its costs stand for the others."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

FEWEST = 2
"""The fewest blocks that are left in a list: one has the list's beginning beside it, the other its end."""

_PLAIN = (bool, int, float, str, type(None), tuple, torch.dtype, FunctionType, BuiltinFunctionType, type)


@dataclass(frozen=True)
class Shortened:
    """A model's `blocks`, those that are `left` in it, and for each block the one that `stands_for` it."""

    blocks: tuple[str, ...]
    left: tuple[str, ...]
    stands_for: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, blocks: tuple[str, ...]) -> "Shortened":
        """Leaves the first blocks of each list: as many as it takes for every kind of block to be among them."""
        stands_for: list[str] = []
        for names in _lists(model, blocks):
            kinds = [_kind(model.get_submodule(name)) for name in names]
            count = max([FEWEST, *(kinds.index(kind) + 1 for kind in kinds)])
            last = {kind: names[i] for i, kind in enumerate(kinds[:count])}
            stands_for += [name if i < count else last[kinds[i]] for i, name in enumerate(names)]
        left = tuple(name for name in blocks if name in set(stands_for))
        return cls(blocks, left, tuple(stands_for))

    @classmethod
    def not_at_all(cls, blocks: tuple[str, ...]) -> "Shortened":
        return cls(blocks, blocks, blocks)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model's lists have only the blocks that are left."""
        lists = [model.get_submodule(path) for path in dict.fromkeys(_parent(name) for name in self.blocks)]
        before = [dict(each._modules) for each in lists]
        try:
            leave_out(model, set(self.blocks) - set(self.left))
            yield
        finally:
            for each, children in zip(lists, before, strict=True):
                each._modules.clear()
                each._modules.update(children)


def leave_out(model: nn.Module, blocks: Iterable[str]) -> None:
    """Removes blocks from their lists; the names of the others stay as they are."""
    for name in blocks:
        del model.get_submodule(_parent(name))._modules[name.rpartition(".")[2]]


def kinds(model: nn.Module, blocks: tuple[str, ...]) -> list[int]:
    """The kind of each block, as a number: equal for equal blocks. Empty where the blocks are not one list."""
    lists = list(_lists(model, blocks))
    if len(lists) != 1:
        return []
    found = [_kind(model.get_submodule(name)) for name in lists[0]]
    return [found.index(kind) for kind in found]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _lists(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[list[str]]:
    """The names of the blocks, list by list. A list that is not a ModuleList, or has blocks that are also used
    elsewhere, is split into lists of one block each, so that none is left out."""
    seen: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        seen[id(module)] = seen.get(id(module), 0) + 1
    for path in dict.fromkeys(map(_parent, blocks)):
        names = [name for name in blocks if _parent(name) == path]
        alone = all(seen[id(model.get_submodule(name))] == 1 for name in names)
        if alone and isinstance(model.get_submodule(path), nn.ModuleList):
            yield names
        else:
            yield from ([name] for name in names)


def _kind(block: nn.Module) -> Any:
    """What equal blocks have in common: modules, parameters, buffers, and all plain attributes except the layer's
    number."""
    tensors = (*block.named_parameters(), *block.named_buffers())
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in tensors)
    told = tuple(
        (path, name, repr(value) if isinstance(value, tuple) else value)
        for path, module in block.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, _PLAIN) and not (name.startswith("layer_") and isinstance(value, int))
    )
    modules = tuple((path, type(module).__qualname__) for path, module in block.named_modules())
    return modules, shapes, told
