"""Types of program values, their text form, and type inference for every operator.

An operator's type rule is its fake kernel, run on the argument types alone, with the strides of real tensors. Models
repeat their layers, so a graph of thousands of nodes has fewer than a hundred distinct pairs of operator and argument
types. Results are cached, and checking a whole program again after each pass takes milliseconds.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import fx

from ...runtime.isa.errors import CaptureError
from ...runtime.isa.fakes import FaithfulFakeMode
from ...runtime.isa.layout import contiguous_stride

DTYPE_TEXT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3fn", torch.float8_e5m2: "f8e5m2",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint64: "u64", torch.uint32: "u32", torch.uint16: "u16", torch.uint8: "u8",
    torch.bool: "b8", torch.complex128: "c128", torch.complex64: "c64",
}  # fmt: skip
TEXT_DTYPE = {text: dtype for dtype, text in DTYPE_TEXT.items()}


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype, shape and strides (in elements) of a tensor. The device is left out, because it is always the device
    tier."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorType":
        """Raises CaptureError for a dtype that programs have no name for."""
        if tensor.dtype not in DTYPE_TEXT:
            raise CaptureError(
                f"the model computes in {tensor.dtype}; expected one of {', '.join(map(str, DTYPE_TEXT))}"
            )
        return cls(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))

    @property
    def num_bytes(self) -> int:
        """Bytes of the smallest storage that holds the tensor."""
        if prod(self.shape) == 0:
            return 0
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return span * self.dtype.itemsize

    def __str__(self) -> str:
        text = f"{DTYPE_TEXT[self.dtype]}[{', '.join(map(str, self.shape))}]"
        if self.stride == contiguous_stride(self.shape):
            return text
        return f"{text}{{{', '.join(map(str, self.stride))}}}"


@dataclass(frozen=True, slots=True)
class NumberType:
    """A Python number; `kind` is "float" or "int"."""

    kind: str

    def __str__(self) -> str:
        return self.kind


NUMBERS = {"float": 0.7390851332151607, "int": 7}
"""For each kind of number, the value that stands for any such number in type inference."""

Type = TensorType | NumberType | tuple["Type", ...] | None
"""A tensor, a number, a tuple of types (operators with several results), or None (an absent or no result)."""


def type_text(value: Type) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(type_text(item) for item in value) + ")"
    return "none" if value is None else str(value)


_TENSOR = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?$")


def parse_type(text: str) -> Type:
    """The inverse of `type_text`. Raises ValueError on anything else."""
    text = text.strip()
    if text == "none":
        return None
    if text in NUMBERS:
        return NumberType(text)
    if text.startswith("(") and text.endswith(")"):
        return tuple(parse_type(item) for item in _split_top_level(text[1:-1]))
    match = _TENSOR.match(text)
    if match is None or match[1] not in TEXT_DTYPE:
        raise ValueError(f"not a type: {text!r}; expected e.g. 'f32[8, 64]', 'f32[8, 64]{{1, 8}}', 'float', 'none'")
    shape = tuple(int(size) for size in match[2].split(",") if size.strip())
    stride = contiguous_stride(shape)
    if match[3] is not None:
        stride = tuple(int(step) for step in match[3].split(",") if step.strip())
        if len(stride) != len(shape):
            raise ValueError(f"not a type: {text!r} has {len(shape)} sizes but {len(stride)} strides")
    return TensorType(TEXT_DTYPE[match[1]], shape, stride)


def _split_top_level(text: str) -> list[str]:
    items, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    tail = text[start:]
    return [*items, tail] if tail.strip() else items


def type_of_value(value: Any) -> Type:
    """The type of a (fake) tensor, a number, None, or a tuple or list of them. Raises ValueError for anything else."""
    if isinstance(value, torch.Tensor):
        return TensorType.of(value)
    if type(value) in (float, int):
        return NumberType(type(value).__name__)
    if isinstance(value, list | tuple):
        return tuple(type_of_value(item) for item in value)
    if value is None:
        return None
    raise ValueError(f"a program value must be a tensor, a number, a tuple of them or None, not {value!r}")


@dataclass(frozen=True, slots=True)
class _Operand:
    """Stands for a node in an operator's arguments, which makes them hashable."""

    type: Type


def infer(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
          type_of: Callable[[fx.Node], Type]) -> Type:  # fmt: skip
    """The result type of `target(*args, **kwargs)`, whose fx.Node arguments have the types given by `type_of`.

    Raises whatever the operator's fake kernel raises on ill-typed arguments.
    """
    operand = lambda node: _Operand(type_of(node))  # noqa: E731
    return _infer(target, freeze(tuple(args), operand), freeze(dict(kwargs), operand))


def freeze(value: Any, node: Callable[[fx.Node], Any]) -> Any:
    """A hashable key for an operator's argument; `node` maps each fx.Node in it to its own key.

    Keys are equal exactly if the arguments are the same: 0.0 and -0.0 differ, as do 1, 1.0 and True.
    """
    match value:  # this runs for every node after every pass: the most frequent cases come first
        case fx.Node():
            return node(value)
        case int():
            return (type(value), value)
        case tuple():
            return (tuple, *[freeze(item, node) for item in value])
        case list():
            return (list, *[freeze(item, node) for item in value])
        case dict():
            return (dict, *[(key, freeze(item, node)) for key, item in value.items()])
        case slice():  # unhashable before Python 3.12
            return (slice, *[freeze(item, node) for item in (value.start, value.stop, value.step)])
        case float() | complex():  # as text, where nan equals nan and zeros have signs
            kind = float if isinstance(value, float) else complex
            return (kind, kind.__repr__(value))
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, _Operand):
        return _fake(value.type)
    if not isinstance(value, tuple):
        return value
    kind, *items = value
    if kind is dict:
        return {key: _thaw(item) for key, item in items}
    if kind is slice:
        return slice(*map(_thaw, items))
    return kind(map(_thaw, items)) if kind in (list, tuple) else kind(*items)


def _fake(value: Type) -> Any:
    if isinstance(value, tuple):
        return tuple(_fake(item) for item in value)
    if isinstance(value, NumberType):
        return NUMBERS[value.kind]
    return None if value is None else torch.empty_strided(value.shape, value.stride, dtype=value.dtype)


_STATISTICS = {
    torch.ops.aten._native_batch_norm_legit_functional.default: (1, 2),
    torch.ops.aten._native_batch_norm_legit.default: (1, 2),
    torch.ops.aten._native_batch_norm_legit.no_stats: (1, 2),
}
"""Positions of results that the kernels keep in float32 but the fakes report in the input's narrower dtype."""


_FAKES = FaithfulFakeMode()
"""Shared, because creating a mode, which records a stack trace, takes longer than most fake kernels."""


@lru_cache(maxsize=16384)
def _infer(target: Callable[..., Any], args: Any, kwargs: Any) -> Type:
    with _FAKES, torch.no_grad():
        result = type_of_value(target(*_thaw(args), **_thaw(kwargs)))
    if target not in _STATISTICS or not isinstance(result, tuple):
        return result
    return tuple(_in_float32(item) if i in _STATISTICS[target] else item for i, item in enumerate(result))


def _in_float32(type: Type) -> Type:
    if isinstance(type, TensorType) and type.dtype in (torch.bfloat16, torch.float16):
        return replace(type, dtype=torch.float32)
    return type


def memory_order(type: TensorType) -> list[int]:
    """The dimensions from the longest stride to the shortest: permuted so, a dense tensor is contiguous."""
    return sorted(range(len(type.shape)), key=lambda dim: -type.stride[dim])
