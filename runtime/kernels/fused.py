"""Inductor for whole functions of programs, on devices where their cost is that of launching kernels."""

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., list[torch.Tensor]]

OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,  # round values between operators as torch's own kernels do
}


def kernel_of(device: torch.device) -> Callable[[Function], Function]:
    """A decorator that compiles a function into a kernel on its first call; on the CPU it does nothing."""
    if device.type != "cuda":
        return lambda function: function
    return torch.compile(fullgraph=True, dynamic=False, options=OPTIONS)
