"""The compute operators of the geminifx namespace, which programs call beside the instructions and torch dispatches."""

import torch

from . import attention, draws, linear_cross_entropy, quantized

OPERATORS = {
    name: getattr(torch.ops.geminifx, name).default
    for module in (attention, draws, linear_cross_entropy, quantized)
    for name in module.OPERATORS
}
"""By name."""
