"""Keeps frozen weights of linear layers as codes and scales, which the model's own Python then computes with, too."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from ...runtime.isa.errors import ArgumentError
from ...runtime.isa.precision import cast_dtype
from ...runtime.isa.quantized import DEQUANTIZE, Dequantized, Quantized, code_shapes, is_quantized
from ...runtime.kernels.packed import Packed
from ...runtime.kernels.quantized import quantize


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised weight in its model: the names of its codes and scales, and the parametrization that dequantises
    it."""

    codes: str
    scales: str
    weight: Dequantized

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        return DEQUANTIZE(codes, scales, self.weight.format, list(self.weight.shape), self.weight.dtype)


def quantized_weights(source: nn.Module) -> dict[str, QuantizedWeight]:
    """All quantised weights, by the names they had before."""
    found: dict[str, QuantizedWeight] = {}
    for path, module in source.named_modules():
        if is_quantized(module):
            owner, _, name = path.rpartition("parametrizations.")
            found[owner + name] = QuantizedWeight(f"{path}.original0", f"{path}.original1", module[0])
    return found


def quantize_frozen(source: nn.Module, format: Quantized | None, compute_dtype: torch.dtype | None) -> None:
    """Quantises, in place and to `format`, each frozen weight of a linear layer that no other module shares. It is
    dequantised where it is read, to the dtype that the model computes in, as are weights quantised by an earlier
    compile() or by another library. Without a `format`, only the latter happens.

    Raises ArgumentError if there is no such weight, one has values that are not finite, or some are already kept in
    another format.
    """
    earlier = [kept.weight for kept in quantized_weights(source).values()]
    others = {dequantized.format for dequantized in earlier} - {format}
    if format is not None and others:
        raise ArgumentError(
            f"frozen={format!r}, but weights of the model are already quantised as {', '.join(sorted(others))}, by an "
            "earlier compile(), bitsandbytes or torchao; leave frozen= out, or build the model again without "
            "quantised weights"
        )
    for dequantized in earlier:
        dequantized.dtype = cast_dtype(torch.empty(0, dtype=dequantized.dtype_before), compute_dtype)
    layers = [] if format is None else list(_frozen_layers(source))
    if format is not None and not layers and not earlier:
        raise ArgumentError(
            f"frozen={format!r} is for frozen weights of nn.Linear, but the model has none; call "
            "requires_grad_(False) on the layers to freeze before compile()"
        )
    for path, layer in layers:
        assert format is not None
        weight = layer.weight
        dequantized = _Quantizing(format, tuple(weight.shape), cast_dtype(weight, compute_dtype), weight.dtype)
        try:
            register_parametrization(layer, "weight", dequantized, unsafe=True)  # the checks would compare dtypes
        except ValueError as error:
            raise ArgumentError(f"frozen={format!r}: {path}: {error}") from error


def keep_packed(layer: nn.Linear, packed: Packed) -> None:
    """Replaces a layer's weight by one that is quantised already."""
    layer.weight = nn.Parameter(torch.empty(packed.shape, dtype=packed.dtype, device="meta"), requires_grad=False)
    dequantized = _Quantizing(packed.format, packed.shape, packed.dtype, packed.dtype)
    register_parametrization(layer, "weight", dequantized, unsafe=True)
    kept = layer.parametrizations["weight"]
    kept.original0 = nn.Parameter(packed.codes.contiguous(), requires_grad=False)
    kept.original1 = nn.Parameter(packed.scales.contiguous(), requires_grad=False)
    layer.parametrizations.train(layer.training)


@contextmanager
def restored_on_failure(source: nn.Module) -> Iterator[None]:
    """Where the body fails, linear layers whose weights it has quantised, or taken over from another library, are
    again what they were, and so are the dtypes to which earlier ones are dequantised."""
    layers = [_Before(module) for module in source.modules() if isinstance(module, nn.Linear)]
    earlier = [(kept.weight, kept.weight.dtype) for kept in quantized_weights(source).values()]
    try:
        yield
    except BaseException:
        for layer in layers:
            layer.restore()
        for dequantized, dtype in earlier:
            dequantized.dtype = dtype
        raise


class _Before:
    """What a linear layer was before its weight was quantised."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.kind = layer, type(layer)
        self.attributes, self.parameters = dict(vars(layer)), dict(layer._parameters)

    def restore(self) -> None:
        layer = self.layer
        if type(layer) is self.kind and layer._parameters.get("weight") is self.parameters.get("weight"):
            return
        if is_parametrized(layer, "weight"):
            remove_parametrizations(layer, "weight")
            del layer.weight
        layer.__class__ = self.kind
        vars(layer).update(self.attributes)
        layer._parameters.clear()  # whose order is to be as it was
        layer._parameters.update(self.parameters)


class _Quantizing(Dequantized):
    """The parametrization that torch asks to quantise a weight, which may be on `meta`."""

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if not weight.is_meta:
            return quantize(weight.detach(), self.format)
        codes, scales = code_shapes(self.format, self.shape)
        kind = torch.int8 if self.format == "int8" else torch.uint8
        return torch.empty(codes, dtype=kind, device="meta"), torch.empty(scales, device="meta")


def _frozen_layers(source: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    held = Counter(id(p) for module in source.modules() for p in module._parameters.values() if p is not None)
    for path, module in source.named_modules():
        if isinstance(module, nn.Linear):
            weight = module._parameters.get("weight")
            if weight is not None and not weight.requires_grad and weight.is_floating_point() and held[id(weight)] == 1:
                yield path, module
