"""What a program was captured from besides parameters, buffers and arguments: numbers, switches, functions, tensors.

A forward reads them from its modules and their configurations, and what it finds is baked into the program. Every
attribute that is read while a model is traced becomes a guard, and a program is used as long as its guards hold: the
idea is torch.compile's. What nothing reads, such as a history that a training loop keeps on the model, guards nothing.

A loss function that is given to compile stands outside of the model: of its modules and objects all that is read is a
guard, modes, buffers and hooks, too, which for the model's own modules are part of a call's key.
"""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import nn
from transformers import PreTrainedConfig

from .known import Snapshot, known_by
from .owners import full_name, owners_in

INTERNAL = frozenset(vars(nn.Module()))
"""What nn.Module itself keeps in a module."""
_ABSENT = object()


def forwards_of(modules: Iterable[nn.Module]) -> tuple[tuple[int, Hashable], ...]:
    """Which modules have a forward of their own instead of their class's, by their place, and which these are."""
    return tuple((place, known_by(vars(m)["forward"])) for place, m in enumerate(modules) if "forward" in vars(m))


def attributes_of(module: nn.Module) -> dict[str, Snapshot]:
    """A module's attributes as they are, but for what nn.Module keeps."""
    return {name: Snapshot(value) for name, value in vars(module).items() if name not in INTERNAL}


def changed_attributes(module: nn.Module, before: Mapping[str, Snapshot]) -> set[str]:
    """The names of those that are not as they were, or new."""
    now = {name: value for name, value in vars(module).items() if name not in INTERNAL}
    kept = {name for name, snapshot in before.items() if name in now and snapshot.holds(now[name])}
    return {*now, *before} - kept


@dataclass(frozen=True)
class Guard:
    """An attribute, `label` by its full name, and what it was."""

    owner: Any
    name: str
    label: str
    snapshot: Snapshot

    @classmethod
    def of(cls, owner: Any, name: str, path: str) -> "Guard":
        snapshot = Snapshot(vars(owner).get(name, _ABSENT))
        return cls(owner, name, full_name(path, name), snapshot)

    def holds(self) -> bool:
        return self.snapshot.holds(vars(self.owner).get(self.name, _ABSENT))


@contextmanager
def recorded(copies: nn.Module, originals: nn.Module, loss_fn: Callable[..., Any] | None) -> Iterator[list[Guard]]:
    """While it is open, what is read of `copies`, which is traced, is recorded; on leaving the list has a guard for
    each, of `originals`. Of what a loss function is made of, which is not copied, it has guards as well."""
    owners = _owners_of(copies, originals)
    beside = {id(owner): (owner, path) for owner, path in owners_in(loss_fn, "loss_fn")}
    owners |= beside
    outside = beside.keys() - set(map(id, originals.modules()))  # a method of the model may compute the loss
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
    """By the identity of each module's and configuration's copy the original, and its full name."""
    owners: dict[int, tuple[Any, str]] = {}
    for (path, copied), original in zip(copies.named_modules(), originals.modules(), strict=True):
        owners[id(copied)] = original, path
        for name, value in list(vars(copied).items()):
            _add_configs(owners, value, vars(original).get(name), f"{path}.{name}" if path else name)
    return owners


def _keeper(owner: Any, name: str, is_outside: bool) -> str:
    """Under which name an object keeps what was read by `name`: a module its buffers in a dict of them."""
    if is_outside and isinstance(owner, nn.Module):
        for held in ("_parameters", "_buffers", "_modules"):
            if name in vars(owner)[held]:
                return held
    return str(getattr(type(owner), "attribute_map", {}).get(name, name))


def _is_private(owner: Any, name: str, is_outside: bool) -> bool:
    """Whether an attribute is Python's own; or, within the model, what nn.Module keeps, and of torch's modules what
    follows from what they were made with."""
    if name.startswith("__") or is_outside:
        return name.startswith("__")
    return name in INTERNAL or (name.startswith("_") and type(owner).__module__.startswith("torch.nn."))


def _add_configs(owners: dict[int, tuple[Any, str]], copied: Any, original: Any, path: str) -> None:
    if isinstance(copied, PreTrainedConfig) and id(copied) not in owners:
        owners[id(copied)] = original, path
        for name, part in list(vars(copied).items()):
            _add_configs(owners, part, vars(original).get(name), f"{path}.{name}")


def _is_missing(owner: Any, name: str) -> bool:
    """Whether an attribute that was asked for is neither there nor made by the class: it may be set one day."""
    if isinstance(owner, nn.Module) and any(
        name in held for held in (owner._parameters, owner._buffers, owner._modules)
    ):
        return False
    found = inspect.getattr_static(type(owner), name, _ABSENT)
    return not callable(found) and not hasattr(found, "__get__")
