"""Types of program values, their text form, and the type rule of every operator.

The rule of an operator is its fake kernel, run on the argument types alone, with the strides of real tensors.
Models repeat their layers, so that a graph of thousands of nodes has under a hundred distinct (operator, argument
types): results are remembered and re-checking a whole program after each pass costs milliseconds.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import fx

from ...runtime.isa.fakes import FaithfulFakeMode

DTYPE_TEXT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "b8", torch.complex64: "c64",
}  # fmt: skip
TEXT_DTYPE = {text: dtype for dtype, text in DTYPE_TEXT.items()}


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides as torch computes them: a dimension of size 0 counts as 1."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype, shape and strides of a tensor. The device is always the device tier, so it is not part."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorType":
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
    """A number of Python's, `kind` "float" or "int"."""

    kind: str

    def __str__(self) -> str:
        return self.kind


NUMBERS = {"float": 0.7390851332151607, "int": 7}
"""By the kinds of numbers, one that stands for all where types are inferred."""

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
    """The type of a (fake) tensor, of a number, of a tuple or list of them, or of None."""
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
    """Stands for a node among an operator's arguments, so that they can be hashed."""

    type: Type


def infer(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
          type_of: Callable[[fx.Node], Type]) -> Type:  # fmt: skip
    """The result type of `target(*args, **kwargs)`, whose fx.Node arguments have the types `type_of` tells.

    Raises whatever the operator's fake kernel raises on ill-typed arguments.
    """
    operand = lambda node: _Operand(type_of(node))  # noqa: E731
    return _infer(target, freeze(tuple(args), operand), freeze(dict(kwargs), operand))


def freeze(value: Any, node: Callable[[fx.Node], Any]) -> Any:
    """A hashable stand-in for an operator's argument, in which `node` tells what stands for a node.

    Stand-ins are equal exactly where the arguments are the same: 0.0 and -0.0 differ, as do 1, 1.0 and True.
    """
    match value:  # this runs for every node after every pass: what comes most often stands first
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
        case slice():  # cannot be hashed before Python 3.12
            return (slice, *[freeze(item, node) for item in (value.start, value.stop, value.step)])
        case float() | complex():  # as text, in which nan equals nan and zeros have signs
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
"""Results that kernels keep in float32 where their fakes tell the input's narrower dtype."""


_FAKES = FaithfulFakeMode()
"""One for all: to make one, which records where it was made, takes longer than most fake kernels."""


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
