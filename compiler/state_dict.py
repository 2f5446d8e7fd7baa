"""A state_dict of whole tensors from processes that each have a shard of some parameters, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.isa.layout import Slot
from ..runtime.memory.lazy_parameter import LazyParameter
from .session import Session


def _slots(session: Session) -> dict[str, Slot]:
    """Where parameters lie, by all of their names."""
    if session.machine is None or not session.is_placed:
        return {}
    places, first = session.machine.store.chunks.layout.places, session.names()
    named = ((name, first[id(p)]) for name, p in session.source.named_parameters(remove_duplicate=False))
    return {name: places[own][0].slots[places[own][1]] for name, own in named}


def sharded_slots(session: Session) -> dict[str, Slot]:
    """Of which parameters this process has a shard, by all of their names, and where that lies."""
    return {name: slot for name, slot in _slots(session).items() if slot.placement}


def whole_state(session: Session, *args: Any, keep: bool, **kwargs: Any) -> Any:
    """The source's state_dict with whole tensors, made one by one by all processes together. The values of those
    that are shared out, and of lazy parameters, are copies on the CPU; names of one parameter share one tensor.

    Without `keep` it is empty, though the others' is not.
    """
    found, slots = session.source.state_dict(*args, **kwargs), sharded_slots(session)
    parameters = dict(session.source.named_parameters(remove_duplicate=False)) if slots else {}
    prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
    built: dict[Any, Tensor] = {}
    for name, value in found.items():
        own = name.removeprefix(prefix)
        owner = id(parameters[own]) if own in slots else getattr(value, "source", None)
        if owner is None:
            continue
        if owner not in built:
            shard = value.source.read() if isinstance(value, LazyParameter) else value.detach()
            if own in slots:
                shard = session.local_shards.join(shard, slots[own], session.device.torch_device)
            built[owner] = shard if keep else torch.empty(0)
        found[name] = built[owner]
    if not keep:
        found.clear()
    return found


def local_shards_of(session: Session, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """This process's shards of whole values.

    Raises ValueError where one has another shape than the parameter.
    """
    slots = sharded_slots(session)
    if not slots:
        return state_dict
    take = session.local_shards.take
    shards = {name: take(value, slots[name]) if name in slots else value for name, value in state_dict.items()}
    return _with_metadata(shards, state_dict)


def _with_metadata(shards: dict[str, Any], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Modules read the versions of their own formats there."""
    if not hasattr(state_dict, "_metadata"):
        return shards
    found = nn.Module().state_dict()
    found.update(shards)
    found._metadata = state_dict._metadata
    return found
