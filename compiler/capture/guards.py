"""Guards: what a program was captured from besides parameters, buffers and arguments, such as numbers and functions.

A forward reads these from its modules and their configurations, and they are baked into the program. Every attribute
that is read during the trace becomes a guard, and a program is reused as long as its guards hold; the idea is
torch.compile's. What nothing reads, such as a history that a training loop keeps on the model, guards nothing.

A loss function given to compile stands outside of the model: everything read from its modules and objects is a guard,
including modes, buffers and hooks, which for the model's own modules are part of a call's key.
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
"""Attributes that nn.Module itself keeps on a module."""
_ABSENT = object()


def forwards_of(modules: Iterable[nn.Module]) -> tuple[tuple[int, Hashable], ...]:
    """The positions of the modules that have a forward assigned on the instance, each with a key of that forward."""
    return tuple((place, known_by(vars(m)["forward"])) for place, m in enumerate(modules) if "forward" in vars(m))


def attributes_of(module: nn.Module) -> dict[str, Snapshot]:
    """Snapshots of a module's attributes, except nn.Module's own, by name."""
    return {name: Snapshot(value) for name, value in vars(module).items() if name not in INTERNAL}


def changed_attributes(module: nn.Module, before: Mapping[str, Snapshot]) -> set[str]:
    """The names of attributes that have changed since `before`, were added or are gone."""
    now = {name: value for name, value in vars(module).items() if name not in INTERNAL}
    kept = {name for name, snapshot in before.items() if name in now and snapshot.holds(now[name])}
    return {*now, *before} - kept


@dataclass(frozen=True)
class Guard:
    """The value an attribute had during the trace; `label` is the attribute's full name."""

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
        for name, value in list(vars(copied).items()):
            _add_configs(owners, value, vars(original).get(name), f"{path}.{name}" if path else name)
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
        owners[id(copied)] = original, path
        for name, part in list(vars(copied).items()):
            _add_configs(owners, part, vars(original).get(name), f"{path}.{name}")


def _is_missing(owner: Any, name: str) -> bool:
    """Whether neither the instance nor its class has an attribute that was asked for: it may be set later."""
    if isinstance(owner, nn.Module) and any(
        name in held for held in (owner._parameters, owner._buffers, owner._modules)
    ):
        return False
    found = inspect.getattr_static(type(owner), name, _ABSENT)
    return not callable(found) and not hasattr(found, "__get__")
