"""Replaces linear layers that bitsandbytes or torchao quantised by plain ones that hold codes and scales of ours."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...runtime.isa.errors import ArgumentError
from ...runtime.kernels.packed import Packed, eight_bits, four_bits, torchao_int8, torchao_nf4
from .quantized_weights import keep_packed


def adopt_quantized(source: nn.Module) -> None:
    """Replaces each such layer in place. The bias stays, and so do the codes if the format is the same as ours.

    Raises ArgumentError for a layer whose weight has an unsupported format or is not quantised yet, and for a model
    that is nothing but such a layer.
    """
    floating = (p.dtype for p in source.parameters() if p.is_floating_point() and not _is_torchao(p))
    dtype = next(floating, torch.float16)  # what layers pass to each other
    found = [(path, module, read) for path, module in source.named_modules() if (read := _reader(module)) is not None]
    for path, module, read in found:
        if not path:
            raise ArgumentError(f"model: it is a {type(module).__name__} alone; put it in a module")
        try:
            packed = read(module)
            if packed.format == "int8":
                packed = replace(packed, dtype=dtype)
        except ValueError as error:
            raise ArgumentError(f"model: {path} is a {type(module).__name__} whose {error}") from error
        parent, _, name = path.rpartition(".")
        setattr(source.get_submodule(parent), name, _plain(module, packed))


def _plain(layer: Any, packed: Packed) -> nn.Linear:
    rows, columns = packed.shape
    made = nn.Linear(columns, rows, bias=layer.bias is not None, device="meta", dtype=packed.dtype)
    made.weight.requires_grad_(False)
    keep_packed(made, packed)
    if layer.bias is not None:
        made.bias = layer.bias
    return made.train(layer.training)


def _reader(module: nn.Module) -> Callable[[Any], Packed] | None:
    """The function that reads the weight of another library's layer; None for other modules. Does not import the
    libraries, which may not be installed."""
    weight = module._parameters.get("weight")
    made_by, kind = type(module).__module__.partition(".")[0], type(module).__name__
    if made_by == "bitsandbytes" and weight is not None:
        return {"Linear4bit": _four_bits, "LinearNF4": _four_bits, "Linear8bitLt": _eight_bits}.get(kind, _unknown)
    if isinstance(module, nn.Linear) and weight is not None:
        return _TORCHAO.get(type(weight.data).__name__) if _is_torchao(weight) else None
    return None


def _is_torchao(weight: Any) -> bool:
    return type(weight.data).__module__.partition(".")[0] == "torchao"


def _four_bits(layer: Any) -> Packed:
    state = layer.weight.quant_state
    if state is None or layer.weight.dtype != torch.uint8:
        raise ValueError("weight is not quantised yet: call .to(device) on the model first, as bitsandbytes asks")
    return four_bits(layer.weight.data, state.as_dict())


def _eight_bits(layer: Any) -> Packed:
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    if scales is None or layer.weight.dtype != torch.int8:
        raise ValueError(
            "weight is not quantised: make it with has_fp16_weights=False and call .to(device) on the model first"
        )
    return eight_bits(layer.weight.data, scales, torch.float16)


def _unknown(layer: Any) -> Packed:
    raise ValueError("format is not read; expected Linear4bit with nf4, or Linear8bitLt")


_TORCHAO: dict[str, Callable[[Any], Packed]] = {
    "Int8Tensor": lambda layer: torchao_int8(layer.weight.data),
    "NF4Tensor": lambda layer: torchao_nf4(layer.weight.data),
}
