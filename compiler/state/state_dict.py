"""Converts between a state_dict of whole tensors and processes that each hold shards of some parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.isa.errors import StateError
from ...runtime.isa.layout import Slot
from ...runtime.isa.precision import is_exact, master_dtype
from ...runtime.memory.lazy_parameter import LazyParameter
from ..session import Session
from ..weights.quantized_weights import QuantizedWeight, quantized_weights


def _shared_out(session: Session) -> dict[str, str]:
    """Parameters divided over processes, by sharding or as layers of a pipeline: each name, mapped to the first."""
    if session.machine is None or not session.is_placed:
        return {}
    layout, first = session.machine.store.chunks.layout, session.names()
    sharded = {name for name, (chunk, slot) in layout.places.items() if chunk.slots[slot].placement}
    named = ((name, first[id(p)]) for name, p in session.source.named_parameters(remove_duplicate=False))
    return {name: own for name, own in named if own in sharded or own in layout.owners}


def whole_shapes(session: Session) -> dict[str, tuple[int, ...]]:
    """The whole shapes of the parameters that are divided over processes, by all of their names."""
    return {name: session.store().chunks.whole_shape(own) for name, own in _shared_out(session).items()}


def sharded_slots(session: Session) -> dict[str, Slot]:
    """The slots of the parameters that this process holds a shard of, by all of their names."""
    shared_out = _shared_out(session)
    places = session.store().chunks.layout.places if shared_out else {}
    found = {name: places[own][0].slots[places[own][1]] for name, own in shared_out.items() if own in places}
    return {name: slot for name, slot in found.items() if slot.placement}


def whole_state(session: Session, *args: Any, keep: bool, **kwargs: Any) -> Any:
    """The source's state_dict with whole tensors, gathered one by one by all processes together. Parameters that are
    divided over processes, and lazy ones, are copies on the CPU; all names of a parameter share one tensor.

    If not `keep`, this process takes part and gets an empty dict.
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
    """One tensor of a state. `read` returns it on the CPU; all processes call it, for the same tensors in the same
    order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class ReadableState:
    """A state_dict whose values are read one by one: tensors by their first names, and further names mapped to
    these."""

    first: dict[str, Readable]
    aliases: dict[str, str]


def readable_state(session: Session) -> ReadableState:
    """The source's state, with nothing read yet. Quantised weights are dequantised when they are read."""
    shared_out, names = _shared_out(session), dict[int, str]()
    first, aliases = dict[str, Readable](), dict[str, str]()
    for name, value in session.source.state_dict(keep_vars=True).items():
        if id(value) in names:
            aliases[name] = names[id(value)]
            continue
        names[id(value)], own = name, shared_out.get(name)
        shape = tuple(value.shape) if own is None else session.store().chunks.whole_shape(own)
        first[name] = Readable(shape, value.dtype, partial(_cpu_value, session, own, value))
    for name, kept in quantized_weights(session.source).items():
        read = partial(_dequantized, kept, first.pop(kept.codes).read, first.pop(kept.scales).read)
        first[name] = Readable(kept.weight.shape, kept.weight.dtype, read)
    return ReadableState(first, aliases)


def dequantized(source: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of whole tensors, with the values of quantised weights under the names they had before."""
    found = dict(state)
    for name, kept in quantized_weights(source).items():
        found[name] = kept.values(found.pop(kept.codes), found.pop(kept.scales))
    return found


def _dequantized(kept: QuantizedWeight, codes: Callable[[], Tensor], scales: Callable[[], Tensor]) -> Tensor:
    return kept.values(codes(), scales())


def _cpu_value(session: Session, shared_out: str | None, value: Tensor) -> Tensor:
    return (_read(value) if shared_out is None else _whole(session, shared_out, value.detach())).cpu()


def _whole(session: Session, parameter: str, value: Tensor) -> Tensor:
    chunks = session.store().chunks
    part = value if parameter in chunks.elsewhere else _read(value)
    return chunks.whole(parameter, part, session.device.torch_device)


def _read(value: Tensor) -> Tensor:
    return value.source.read() if isinstance(value, LazyParameter) else value.detach()


def make_masters(session: Session, state_dict: Mapping[str, Any]) -> None:
    """Puts the model's values where the plan wants them if parameters of 16 bits, which will have wider masters, are
    about to take values that they cannot hold exactly.

    Raises StateError if there is no such plan: values would be rounded.
    """
    wider = next((name for name, p in session.source.named_parameters() if _is_too_narrow(p, state_dict.get(name))), "")
    if not wider:
        return
    if not session.is_placed and (session.setup or session.plan_by_guess()):
        session.placed()
    if _is_too_narrow(session.source.get_parameter(wider), state_dict[wider]):
        raise StateError(
            f"{wider} is {session.source.get_parameter(wider).dtype} until memory for training is planned, which "
            f"cannot hold values of {state_dict[wider].dtype} exactly; call the model once, for a training step, or "
            "pass example_inputs= to compile, before loading them"
        )


def _is_too_narrow(parameter: nn.Parameter, value: Any) -> bool:
    will_widen = master_dtype(parameter) != parameter.dtype and not parameter.is_meta
    return will_widen and isinstance(value, Tensor) and not is_exact(value.dtype, parameter.dtype)


def local_shards_of(session: Session, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state_dict with this process's shards in place of whole values.

    Raises ValueError if a value and its parameter differ in shape.
    """
    slots = sharded_slots(session)
    if not slots:
        return state_dict
    take = session.local_shards.take
    shards = {name: take(value, slots[name]) if name in slots else value for name, value in state_dict.items()}
    return _with_metadata(shards, state_dict)


def _with_metadata(shards: dict[str, Any], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps the `_metadata` of a state_dict, in which modules look up the version of its format."""
    if not hasattr(state_dict, "_metadata"):
        return shards
    found = nn.Module().state_dict()
    found.update(shards)
    found._metadata = state_dict._metadata
    return found
