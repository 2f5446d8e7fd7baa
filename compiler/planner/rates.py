"""What a machine does in a second, and how much an operator computes."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import flop_registry

from ...passes.program.program import note, type_of
from ...passes.program.types import TensorType


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second; orders of magnitude are enough to rank plans.

    `host_params_per_s` is how fast the host updates parameters whose state it holds, by our kernel while copies
    run; `passing_params_per_s` how fast others pass through its memory to be updated on the device, which slows the
    host's updates; `torch_params_per_s` how fast a torch optimizer updates on the host, gradients and casts included;
    `device_params_per_s` how fast the device updates what it holds; `host_sums_per_s` and `device_sums_per_s` how many
    elements of gradients either adds to others. Where `overlaps`, copies and our updates run beside
    compute.
    """

    flops_per_s: float
    bus_bytes_per_s: float
    host_params_per_s: float
    passing_params_per_s: float
    torch_params_per_s: float
    device_params_per_s: float
    host_sums_per_s: float
    device_sums_per_s: float
    overlaps: bool


CUDA = Rates(
    flops_per_s=520e12, bus_bytes_per_s=28e9, host_params_per_s=5e9, passing_params_per_s=12e9,
    torch_params_per_s=3e9, device_params_per_s=100e9, host_sums_per_s=12e9, device_sums_per_s=300e9, overlaps=True,
)  # fmt: skip
"""Measured on H100 and H200 with PCIe 5 and 16 cores, both directions of the bus and the host's updates busy.

Fitted to profiles of OPT x 1024 on H100. Of 2.7B the device computed 3.5e14 FLOP in 0.638 s at batch 16 and 1.63e14
in 0.324 s at batch 8, that is 500 to 550 TFLOP/s. The host updated 79M parameters in 13 to 16 ms and 67M in 11 to
15 ms; where others were streamed, for which the bus gave 28 GB/s, in up to 22 ms. The device updated 1.3B in 11 ms.
"""

LAUNCH_S = 1.5e-3
"""What the launching thread needs to send one chunk's state through the device, in pieces."""

_INFINITE = float("inf")
ARENA = Rates(
    flops_per_s=50e9, bus_bytes_per_s=8e9, host_params_per_s=_INFINITE, passing_params_per_s=_INFINITE,
    torch_params_per_s=_INFINITE, device_params_per_s=_INFINITE, host_sums_per_s=_INFINITE,
    device_sums_per_s=_INFINITE, overlaps=False,
)  # fmt: skip
"""One CPU: both tiers are the same memory and the same cores update on either side."""


def flops(node: torch.fx.Node) -> int:
    """What an operator computes, by torch's formulas, of the types of its operands: 0 of one that they do not know."""
    formula = flop_registry.get(getattr(node.target, "_overloadpacket", None))
    if formula is None:
        return 0
    shape = lambda value: _shape(type_of(value))  # noqa: E731
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), shape)
    return int(formula(*args, **kwargs, out_val=_shape(note(node).type)))


def _shape(value: object) -> object:
    """Shapes as torch's formulas take them."""
    if isinstance(value, tuple):
        return tuple(map(_shape, value))
    return torch.Size(value.shape) if isinstance(value, TensorType) else value
