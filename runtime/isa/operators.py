"""The compute operators of the namespace, which programs call beside the instructions: torch runs them by kernels."""

import torch

from . import attention, draws, linear_cross_entropy, quantized

OPERATORS = {
    name: getattr(torch.ops.geminifx, name).default
    for module in (attention, draws, linear_cross_entropy, quantized)
    for name in module.OPERATORS
}
"""By name."""
