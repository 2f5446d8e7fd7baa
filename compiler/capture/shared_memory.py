"""Tensors that share memory. A program gives parameters places of their own and reads each buffer once, so a write to
one of two such tensors would not reach the other."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...passes.program.program import Program
from ...runtime.isa.errors import CaptureError
from .guards import INTERNAL

_DEEPEST = 4


def attributes(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that modules hold besides parameters and buffers, directly or in containers, by full name."""
    own = set(map(id, (*model.parameters(), *model.buffers())))
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in INTERNAL:
                held = _tensors_in(value, f"{path}.{name}" if path else name)
                found |= {label: tensor for label, tensor in held if id(tensor) not in own}
    return found


def _tensors_in(value: Any, label: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield label, value
    elif isinstance(value, list | tuple | dict) and depth < _DEEPEST:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors_in(each, f"{label}[{key!r}]", depth + 1)


def check_trained(model: nn.Module) -> None:
    """Raises ValueError if a trained parameter shares memory with another tensor of the model: chunks give each
    parameter a place of its own, so the two would diverge."""
    parameters, others = dict(model.named_parameters()), attributes(model)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    for first, second in overlapping({**parameters, **dict(model.named_buffers()), **others}, trained):
        if first in others or second in others:
            first, second = (second, first) if first in others else (first, second)
            raise ValueError(
                f"{second} shares the memory of parameter {first}, as .data, .detach() and views do, and would keep "
                "its old values while the parameter is trained; make it in the forward, where it is used, or store a "
                ".clone() if its values should stay as they are"
            )
        raise ValueError(
            f"{first} and {second} are two tensors that share memory, as .data = and nn.Parameter(w.t()) make them, "
            "which a compiled model cannot preserve; tie them as one parameter, second.weight = first.weight, and "
            "transpose it where it is used"
        )


def check_written(model: nn.Module, program: Program) -> None:
    """Raises CaptureError if the forward writes to a buffer that shares memory with another tensor of the model, or
    computes with a tensor, from wherever, that shares memory with a trained parameter."""
    parameters, written = dict(model.named_parameters()), program.results_of("mutation").keys()
    others = attributes(model)
    known = set(map(id, others.values()))
    constants = {name: tensor for name, tensor in program.constants.items() if id(tensor) not in known}
    for first, second in overlapping({**parameters, **dict(model.named_buffers()), **others, **constants}, written):
        buffer, other = (first, second) if first in written else (second, first)
        raise CaptureError(
            f"the forward writes to the buffer {buffer}, whose memory it shares with {_described(other, constants)}, "
            "which would not see what is written; expected one tensor for each memory: where the other is used, make "
            f"it in the forward as a view of self.{buffer.rpartition('.')[2]}"
        )
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    for first, second in overlapping({**{name: parameters[name] for name in trained}, **constants}, trained):
        parameter, other = (first, second) if first in trained else (second, first)
        raise CaptureError(
            f"the forward computes with {_described(other, constants)}, which shares the memory of parameter "
            f"{parameter} and would keep its old values while the parameter is trained; make it from the parameter in "
            "the forward"
        )


def _described(name: str, constants: Mapping[str, Tensor]) -> str:
    if name not in constants:
        return name
    return f"a {list(constants[name].shape)} tensor that is not an attribute of a module"


def overlapping(tensors: Mapping[str, Tensor], some: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names of tensors that share memory, at least one of each pair being in `some`."""
    chosen = set(some)
    held: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta:
            size = tensor.element_size()
            start = tensor.storage_offset() * size
            extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            held[tensor.untyped_storage()._cdata].append((start, start + extent * size, name))
    for places in held.values():
        begun: list[tuple[int, str]] = []
        for start, end, second in sorted(places):
            begun = [(other, name) for other, name in begun if other > start]
            yield from ((first, second) for _, first in begun if first in chosen or second in chosen)
            begun.append((end, second))
