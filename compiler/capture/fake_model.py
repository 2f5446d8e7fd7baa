"""Fakes of a model's and a call's tensors: metadata without memory, which is all that tracing needs."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.isa.fakes import FaithfulFakeMode
from ...runtime.isa.precision import cast_dtype
from .shared_memory import attributes


def fake(mode: FaithfulFakeMode, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A fake of `tensor` as the program takes it: cast to `dtype` if it is of another float dtype."""
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=cast_dtype(tensor, dtype))
    return made.requires_grad_(tensor.requires_grad)


def fake_copy(model: nn.Module, mode: FaithfulFakeMode, dtypes: Mapping[str, torch.dtype],
               shapes: Mapping[str, tuple[int, ...]]) -> tuple[nn.Module, dict[int, Tensor]]:  # fmt: skip
    """A copy of `model` with fake parameters and buffers; other tensors copied with it, mapped from id to original."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        with mode:  # chunks hold parameters contiguously
            made = torch.empty(shapes.get(name, parameter.shape), dtype=dtypes[name])
        memo[id(parameter)] = nn.Parameter(made, requires_grad=parameter.requires_grad)
    memo |= {id(buffer): fake(mode, buffer.detach(), None) for buffer in model.buffers()}
    computed = [value for value in attributes(model).values() if not value.is_leaf]
    memo |= {id(value): value.detach() for value in computed}  # deepcopy refuses non-leaf tensors
    fake_model = copy.deepcopy(model, memo)
    copied = (*memo.get(id(memo), ()), *computed)  # memo[id(memo)] keeps the originals alive
    return fake_model, {
        id(memo[id(value)]): value for value in copied if isinstance(value, Tensor) and id(value) in memo
    }
