"""Turns linear layers that bitsandbytes or torchao quantised into plain ones that hold codes and scales of ours."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...runtime.isa.errors import ArgumentError
from ...runtime.kernels.packed import Packed, eight_bits, four_bits, torchao_int8, torchao_nf4
from .quantized_weights import keep_packed

_STATE = ("quant_state", "state")
"""Attributes in which layers of bitsandbytes hold codes and scales beside their weight."""

_ACCELERATE = ("forward", "_hf_hook", "_old_forward")
"""Attributes by which accelerate moves a layer's inputs to the layer's device, which programs do themselves."""


def adopt_quantized(source: nn.Module) -> None:
    """Changes each such layer in place, so that it keeps its hooks, its attributes and all of its places in the model.
    The bias stays, and so do the codes if the format is the same as ours. All layers are read before one is changed.

    Raises ArgumentError for a layer whose weight has an unsupported format or is not quantised yet, and for a layer
    of bitsandbytes whose forward was replaced.
    """
    floating = (p.dtype for p in source.parameters() if p.is_floating_point())
    dtype = next(floating, torch.float16)  # what layers pass to each other
    found = [
        (layer, _read(path, layer, read))
        for path, layer in source.named_modules()
        if (read := _reader(layer, dtype)) is not None
    ]
    for layer, packed in found:
        if _is_of_bitsandbytes(layer):
            layer.__class__ = nn.Linear
            for name in (*_STATE, *_ACCELERATE):
                vars(layer).pop(name, None)
        keep_packed(layer, packed)


def _read(path: str, layer: Any, read: Callable[[Any], Packed]) -> Packed:
    """The layer's weight. Raises ArgumentError, naming the layer, for what `adopt_quantized` refuses."""
    name = f"{path or 'it'} is a {type(layer).__name__} whose"
    if _is_of_bitsandbytes(layer) and "forward" in vars(layer) and not _forward_is_accelerates(layer):
        raise ArgumentError(
            f"model: {name} forward was replaced, but would not run, because the layer becomes a plain nn.Linear; "
            "expected the library's own forward: delete the attribute forward, and move the additional computation to "
            "a module around the layer or to a forward hook"
        )
    try:
        return read(layer)
    except ValueError as error:
        raise ArgumentError(f"model: {name} {error}") from error


def _forward_is_accelerates(layer: nn.Module) -> bool:
    """Whether the layer's forward is accelerate's around the layer's own, and does no more than move inputs."""
    forward, hook, old = (vars(layer).get(name) for name in _ACCELERATE)
    is_around = getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
    moves_only = type(hook).__name__ == "AlignDevicesHook" and type(hook).__module__ == "accelerate.hooks"
    return is_around and moves_only and getattr(old, "__func__", None) is type(layer).forward


def _reader(module: nn.Module, dtype: torch.dtype) -> Callable[[Any], Packed] | None:
    """The function that reads the weight of another library's layer; None for other modules. Codes that do not tell
    the dtype of their weight stand for one of `dtype`. Does not import the libraries, which may not be installed."""
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if _is_of_bitsandbytes(module):
        of_eight_bits: Callable[[Any], Packed] = partial(_eight_bits, dtype=dtype)
        readers = {"Linear4bit": _four_bits, "LinearNF4": _four_bits, "Linear8bitLt": of_eight_bits}
        return readers.get(type(module).__name__, _unknown)
    if isinstance(module, nn.Linear):
        return _TORCHAO.get(type(weight.data).__name__) if _is_torchao(weight) else None
    return None


def _is_of_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


def _is_torchao(weight: Any) -> bool:
    return type(weight.data).__module__.partition(".")[0] == "torchao"


def _four_bits(layer: Any) -> Packed:
    state = layer.weight.quant_state
    if state is None or layer.weight.dtype != torch.uint8:
        raise ValueError("weight is not quantised yet: call .to(device) on the model first, as bitsandbytes requires")
    return four_bits(layer.weight.data, state.as_dict())


def _eight_bits(layer: Any, dtype: torch.dtype) -> Packed:
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    if scales is None or layer.weight.dtype != torch.int8:
        raise ValueError(
            "weight is not quantised: make it with has_fp16_weights=False and call .to(device) on the model first"
        )
    return eight_bits(layer.weight.data, scales, dtype if layer.bias is None else layer.bias.dtype)


def _unknown(layer: Any) -> Packed:
    raise ValueError("format is not supported; expected Linear4bit with nf4, or Linear8bitLt")


_TORCHAO: dict[str, Callable[[Any], Packed]] = {
    "Int8Tensor": lambda layer: torchao_int8(layer.weight.data),
    "NF4Tensor": lambda layer: torchao_nf4(layer.weight.data),
}
