"""Kernels of the operators in programs, which importing this package registers, and of the optimizer's updates."""

from . import attention, linear_cross_entropy, quantized

__all__ = ["attention", "linear_cross_entropy", "quantized"]
