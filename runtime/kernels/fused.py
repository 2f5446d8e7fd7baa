"""Functions of programs that are compiled whole by Inductor, on devices where launching kernels is what they cost."""

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., list[torch.Tensor]]

OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,  # between operators values are rounded as torch's own kernels round them
}


def kernel_of(device: torch.device) -> Callable[[Function], Function]:
    """What makes a kernel of a function, when it is first called; on the CPU the function runs as it stands."""
    if device.type != "cuda":
        return lambda function: function
    return torch.compile(fullgraph=True, dynamic=False, options=OPTIONS)
