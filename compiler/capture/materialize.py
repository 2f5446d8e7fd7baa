"""Gives memory to weights on `meta`, so that a state_dict can be loaded into them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.isa.errors import StateError
from .owners import full_name
from .weak_references import without_weak_references


def check_loadable(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Raises StateError if a value on `meta` is neither in `state_dict` nor computable."""
    _check_complete(model, state_dict)
    _check_buffers(model)


def check_expected(unexpected: Sequence[str]) -> None:
    """Raises StateError for values that were loaded beside those that the model has."""
    if unexpected:
        raise StateError(
            f"load_state_dict: the model has no {', '.join(unexpected[:5])}; all others are loaded. Pass strict=False "
            "to ignore what is not the model's"
        )


def materialize(model: nn.Module, take_places: Callable[[], None]) -> None:
    """Gives memory to everything on `meta`: buffers as `give_buffers` does, then parameters, uninitialised and on the
    CPU; these keep their identity. `take_places` is called in between: parameters that it takes off `meta`, with places
    in chunks or none, get no memory here."""
    give_buffers(model)
    take_places()
    with without_weak_references(model):
        for parameter in model.parameters():
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                torch.utils.swap_tensors(parameter, nn.Parameter(empty, parameter.requires_grad))


def give_buffers(model: nn.Module) -> None:
    """Replaces buffers on `meta`. Those that no state_dict holds, such as rotary frequencies, are computed as in
    Hugging Face's own loading; the others are zeros until they are loaded. Raises StateError, and changes nothing, if
    one cannot be computed."""
    _check_buffers(model)
    derived = [module for module in model.modules() if _derived(module)]
    replace_buffers(model, lambda buffer: torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer)
    with torch.no_grad(), torch.random.fork_rng():
        for module in derived:
            model._init_weights(module)


def replace_buffers(model: nn.Module, by: Callable[[Tensor], Tensor]) -> None:
    """Replaces each buffer with what `by` makes of it; modules that share a buffer share its replacement."""
    made = {id(buffer): by(buffer) for buffer in model.buffers()}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made[id(buffer)]


def _check_buffers(model: nn.Module) -> None:
    derived = [(path, module) for path, module in model.named_modules() if _derived(module)]
    if derived and not hasattr(model, "_init_weights"):
        path, module = derived[0]
        raise StateError(
            f"nothing was loaded: buffer {full_name(path, _derived(module)[0])} is on 'meta' and is not part of the "
            "state_dict, so its values are unknown. Make it persistent, or create it with values (device='cpu') where "
            "the module is built"
        )


def _check_complete(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    names: dict[int, list[str]] = defaultdict(list)  # a tied tensor may be loaded under any of its names
    own = model.state_dict(keep_vars=True)
    for name, tensor in own.items():
        names[id(tensor)].append(name)
    for group in names.values():
        given = next((name for name in group if name in state_dict), None)
        found = None if given is None else tuple(state_dict[given].shape)
        if own[group[0]].is_meta and found != tuple(own[group[0]].shape):
            what = "lacks it" if found is None else f"has shape {found}"
            raise StateError(
                f"the weights are on 'meta' and nothing was loaded: {group[0]} has shape "
                f"{tuple(own[group[0]].shape)}, but the state_dict {what}"
            )


def _derived(module: nn.Module) -> list[str]:
    """The names of a module's own non-persistent buffers on `meta`."""
    transient = module._non_persistent_buffers_set
    return [name for name in transient if (buffer := module._buffers.get(name)) is not None and buffer.is_meta]
