"""The sizes of the storages behind an operator's results.

A kernel may leave more behind a result than the result shows: a loss keeps its values from before they were averaged,
and a write to a part of a view copies the whole storage that the view belongs to.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from ...passes.program.program import type_of
from ...passes.program.types import TensorType, Type

_aten = torch.ops.aten


def storage_bytes(node: fx.Node, behind: Callable[[fx.Node], int]) -> list[int]:
    """Bytes of the storage of each result of a node that returns no views; `behind` gives them for its arguments."""
    results = tensors_of(type_of(node))
    own = [t.num_bytes for t in results]
    if node.target in _COPY_STORAGES:  # torch before 2.12 writes out dimensions that were expanded
        return [max(t.num_bytes, prod(t.shape) * t.dtype.itemsize, behind(node.args[0])) for t in results]
    more = _MORE.get(node.target)
    return own if more is None else [max(num_bytes, more(node)) for num_bytes in own]


def tensors_of(value: Type) -> list[TensorType]:
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return [value] if isinstance(value, TensorType) else []


def _unreduced_bytes(node: fx.Node) -> int:
    """Losses are computed element by element, in the storage that then holds their mean."""
    types = [type_of(value) for value in node.args[:2]]
    shapes = [t.shape for t in types if isinstance(t, TensorType)]
    return torch.broadcast_shapes(*shapes).numel() * tensors_of(type_of(node))[0].dtype.itemsize


def _offsets_bytes(node: fx.Node) -> int:
    """The bag of each index, and one element more."""
    indices = tensors_of(type_of(node.args[1]))[0]
    return indices.num_bytes + indices.dtype.itemsize


_MORE: Mapping[Any, Callable[[fx.Node], int]] = {
    _aten._embedding_bag.default: _offsets_bytes,
    _aten.binary_cross_entropy.default: _unreduced_bytes,
    _aten.mse_loss.default: _unreduced_bytes,
    _aten.smooth_l1_loss.default: _unreduced_bytes,
    _aten.soft_margin_loss.default: _unreduced_bytes,
}

_COPY_STORAGES = frozenset({
    _aten.as_strided_scatter.default, _aten.copy.default, _aten.diagonal_scatter.default, _aten.resize.default,
    _aten.select_scatter.default, _aten.slice_scatter.default,
})  # fmt: skip
"""Operators that copy the whole storage of their first argument, even where that is a small part of it."""
