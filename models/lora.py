"""PEFT's LoRA on top of weights from files: the files lack the adapters, which PEFT itself initialises."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.isa.errors import StateError

BASE = "base_model.model."
"""PEFT's prefix for the names of the model that it wraps."""

LAYER = ".base_layer."
"""PEFT's infix in the name of a weight with an adapter beside it."""


def plain_name(name: str) -> str:
    """The name that a parameter had before PEFT wrapped its model."""
    return name.removeprefix(BASE).replace(LAYER, ".")


def adapter_names(model: nn.Module) -> list[str]:
    """The full names of all adapter parameters."""
    return [
        f"{path}.{part}.{name}"
        for path, layer in _layers(model)
        for part in layer.adapter_layer_names
        if isinstance(getattr(layer, part, None), nn.Module)
        for name, _ in getattr(layer, part).named_parameters()
    ]


def initialise_adapters(model: nn.Module, empty: Mapping[str, Tensor], seed: int,
                        give: Callable[[str, Tensor], None]) -> None:  # fmt: skip
    """Draws the values of all adapters from `seed`, as PEFT does when it makes them, and hands them to `give`.

    `empty` has the parameters without memory, by name; the model's own are not read. Raises StateError for adapters
    whose values PEFT computes from the weights beside them.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for path, layer in _layers(model):
            with _lent(path, layer, empty) as lent:
                for adapter in layer.r:
                    _reset(model, path, layer, adapter)
            for name, values in lent.items():
                if values.isnan().any():
                    raise _unknown(name)
                give(name, values.detach())


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, layer) for path, layer in model.named_modules() if hasattr(layer, "reset_lora_parameters"))


def _reset(model: nn.Module, path: str, layer: Any, adapter: str) -> None:
    configs = getattr(model, "peft_config", {})
    how = configs[adapter].init_lora_weights if adapter in configs else True
    try:
        layer.reset_lora_parameters(adapter, how)
    except ValueError as error:
        raise _unknown(path) from error


def _unknown(name: str) -> StateError:
    return StateError(
        f"the adapter {name} has no values in the files, and PEFT cannot initialise it without the weight that it "
        "adapts; expected init_lora_weights=True or 'gaussian', or values loaded with load_state_dict(...)"
    )


@contextmanager
def _lent(path: str, layer: Any, empty: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Replaces a layer's adapter parameters by CPU tensors of NaN while open, and yields these by full name."""
    lent: dict[str, nn.Parameter] = {}
    own: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in layer.adapter_layer_names:
        holder = getattr(layer, part, None)
        for inner, module in holder.named_modules() if isinstance(holder, nn.Module) else ():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    full = ".".join(word for word in (path, part, inner, name) if word)
                    values = torch.full_like(empty[full], torch.nan, device="cpu")
                    own.append((module, name, parameter))
                    lent[full] = nn.Parameter(values, requires_grad=False)
    try:
        for (module, name, _), values in zip(own, lent.values(), strict=True):
            module._parameters[name] = values
        yield lent
    finally:
        for module, name, parameter in own:
            module._parameters[name] = parameter
