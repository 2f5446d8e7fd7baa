"""What a plan costs in time, by a model coarse enough to be read: only differences between plans count."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import flop_registry

from ..passes.plan import Plan
from ..passes.program import Program, note, type_of
from ..passes.types import TensorType
from ..runtime.ops import FETCH


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second; orders of magnitude are enough to rank plans.

    `host_params_per_s` is how fast the host updates parameters whose optimizer state it holds, gradients and
    casts included. Where `overlaps`, copies run beside compute and cost only what compute does not hide.
    """

    flops_per_s: float
    bus_bytes_per_s: float
    host_params_per_s: float
    overlaps: bool


CUDA = Rates(flops_per_s=400e12, bus_bytes_per_s=50e9, host_params_per_s=3e9, overlaps=True)
"""Measured on an H200 with PCIe 5 and 16 cores, through the generic optimizer route."""

ARENA = Rates(flops_per_s=50e9, bus_bytes_per_s=8e9, host_params_per_s=float("inf"), overlaps=False)
"""One CPU: both tiers are the same memory and the same cores update on either side."""


def step_s(program: Program, plan: Plan, rates: Rates) -> float:
    """Modelled seconds of one training step: compute, the copies it does not hide, host updates."""
    compute_s = sum(map(_flops, program.computes)) / rates.flops_per_s
    chunks, residency = plan.layout.chunks, plan.residency
    on_host = [chunk for chunk in chunks if chunk.index not in residency.masters]
    copied = {chunk.index: chunk.compute_bytes for chunk in on_host}
    fetched = [int(fetch.args[0]) for fetch in program.calls(FETCH)]
    once = sum(copied.get(index, 0) for index in residency.weights)
    streamed = sum(copied.get(index, 0) for index in fetched if index not in residency.weights)
    copy_s = (once + streamed) / rates.bus_bytes_per_s
    update_s = sum(chunk.numel for chunk in on_host if chunk.trainable) / rates.host_params_per_s
    return compute_s + max(0.0, copy_s - compute_s * rates.overlaps) + update_s


def _flops(node: torch.fx.Node) -> int:
    formula = flop_registry.get(getattr(node.target, "_overloadpacket", None))
    if formula is None or note(node).type is None:
        return 0
    shape = lambda value: _shape(type_of(value))  # noqa: E731
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), shape)
    return int(formula(*args, **kwargs, out_val=_shape(note(node).type)))


def _shape(value: object) -> object:
    """Shapes as torch's formulas take them."""
    if isinstance(value, tuple):
        return tuple(map(_shape, value))
    return torch.Size(value.shape) if isinstance(value, TensorType) else value
