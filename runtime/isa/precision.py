"""The dtypes that parameters and inputs are computed in, and gradients are summed in."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .quantized import is_quantized

LOW = (torch.bfloat16, torch.float16)

ReduceDtype = Literal["fp32", "compute"]
"""The dtype that processes sum gradients in: at least float32, or the gradients' own."""


def parameter_dtypes(model: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The compute dtype of every parameter, under each of its names; None leaves all as the model has them.

    Batch and instance norms stay in float32 with their running statistics, whose small updates would be rounded away;
    their kernels take low-precision inputs. So do the scales of quantised weights, which are cast as they are
    dequantised.
    """
    whole = (m for m in model.modules() if isinstance(m, _NormBase) or is_quantized(m))
    kept = {id(p) for m in whole for p in m.parameters(recurse=False)}
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.dtype if id(p) in kept else cast_dtype(p, dtype) for name, p in named}


def cast_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype` replaces float32 and narrower floats; integers and float64 stay."""
    casts = dtype is not None and tensor.is_floating_point() and tensor.itemsize <= 4
    return dtype if casts and dtype is not None else tensor.dtype


def master_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's master: float32 if it is trained in a 16-bit dtype, whose rounding would lose small
    updates. A frozen parameter is its own master."""
    return torch.float32 if parameter.dtype in LOW and parameter.requires_grad else parameter.dtype


def is_exact(saved: torch.dtype, kept: torch.dtype) -> bool:
    """Whether a conversion from dtype `saved` to dtype `kept` loses nothing."""
    is_floating = saved.is_floating_point and kept.is_floating_point
    return saved == kept or (is_floating and torch.promote_types(saved, kept) == kept)


def sum_dtype(dtype: torch.dtype, reduce_dtype: ReduceDtype) -> torch.dtype:
    """The dtype that processes sum gradients of `dtype` in."""
    return torch.promote_types(dtype, torch.float32) if reduce_dtype == "fp32" else dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and logsumexp: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
