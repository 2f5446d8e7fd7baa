"""A state_dict of whole tensors from processes that each have a shard of some parameters, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.isa.layout import Slot
from ...runtime.memory.lazy_parameter import LazyParameter
from ..session import Session
from ..weights.quantized_weights import Kept, kept_weights


def _shared_out(session: Session) -> dict[str, str]:
    """Of which parameters a process has less than all, by all of their names, and what they are called first."""
    if session.machine is None or not session.is_placed:
        return {}
    layout, first = session.machine.store.chunks.layout, session.names()
    sharded = {name for name, (chunk, slot) in layout.places.items() if chunk.slots[slot].placement}
    named = ((name, first[id(p)]) for name, p in session.source.named_parameters(remove_duplicate=False))
    return {name: own for name, own in named if own in sharded or own in layout.owners}


def whole_shapes(session: Session) -> dict[str, tuple[int, ...]]:
    """The shapes that parameters have as a whole, of which a process has less, by all of their names."""
    return {name: session.store().chunks.whole_shape(own) for name, own in _shared_out(session).items()}


def sharded_slots(session: Session) -> dict[str, Slot]:
    """Of which parameters this process has a shard, by all of their names, and where that lies."""
    shared_out = _shared_out(session)
    places = session.store().chunks.layout.places if shared_out else {}
    found = {name: places[own][0].slots[places[own][1]] for name, own in shared_out.items() if own in places}
    return {name: slot for name, slot in found.items() if slot.placement}


def whole_state(session: Session, *args: Any, keep: bool, **kwargs: Any) -> Any:
    """The source's state_dict with whole tensors, made one by one by all processes together. The values of those
    that are shared out, and of lazy parameters, are copies on the CPU; names of one parameter share one tensor.

    Without `keep` it is empty, though the others' is not.
    """
    found, shared_out = session.source.state_dict(*args, **kwargs), _shared_out(session)
    prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
    built: dict[Any, Tensor] = {}
    for name, value in found.items():
        first = shared_out.get(name.removeprefix(prefix))
        owner = first or getattr(value, "source", None)
        if owner is None:
            continue
        if owner not in built:
            whole = _read(value) if first is None else _whole(session, first, value)
            built[owner] = whole if keep else torch.empty(0)
        found[name] = built[owner]
    if not keep:
        found.clear()
    return found


@dataclass(frozen=True)
class Readable:
    """One tensor of a state: `read` makes it, on the CPU, and all processes call it for one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class ReadableState:
    """A state_dict whose values are read one by one: by first names, and all further names of these."""

    first: dict[str, Readable]
    aliases: dict[str, str]


def readable_state(session: Session) -> ReadableState:
    """The source's state, of which nothing is read yet; quantised weights are dequantised as they are."""
    shared_out, names = _shared_out(session), dict[int, str]()
    first, aliases = dict[str, Readable](), dict[str, str]()
    for name, value in session.source.state_dict(keep_vars=True).items():
        if id(value) in names:
            aliases[name] = names[id(value)]
            continue
        names[id(value)], own = name, shared_out.get(name)
        shape = tuple(value.shape) if own is None else session.store().chunks.whole_shape(own)
        first[name] = Readable(shape, value.dtype, partial(_cpu_value, session, own, value))
    for name, kept in kept_weights(session.source).items():
        read = partial(_dequantized, kept, first.pop(kept.codes).read, first.pop(kept.scales).read)
        first[name] = Readable(kept.weight.shape, kept.weight.dtype, read)
    return ReadableState(first, aliases)


def dequantized(source: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole state with the values of quantised weights under the names that these had."""
    found = dict(state)
    for name, kept in kept_weights(source).items():
        found[name] = kept.values(found.pop(kept.codes), found.pop(kept.scales))
    return found


def _dequantized(kept: Kept, codes: Callable[[], Tensor], scales: Callable[[], Tensor]) -> Tensor:
    return kept.values(codes(), scales())


def _cpu_value(session: Session, shared_out: str | None, value: Tensor) -> Tensor:
    return (_read(value) if shared_out is None else _whole(session, shared_out, value.detach())).cpu()


def _whole(session: Session, parameter: str, value: Tensor) -> Tensor:
    chunks = session.store().chunks
    part = value if parameter in chunks.elsewhere else _read(value)
    return chunks.whole(parameter, part, session.device.torch_device)


def _read(value: Tensor) -> Tensor:
    return value.source.read() if isinstance(value, LazyParameter) else value.detach()


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
