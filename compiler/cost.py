"""What a plan costs in time, by a model coarse enough to be read: only differences between plans count."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import flop_registry

from ..passes.plan import Plan, Residency
from ..passes.program import Program, note, type_of
from ..passes.types import TensorType
from ..runtime.layout import ChunkLayout
from ..runtime.ops import FETCH


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second; orders of magnitude are enough to rank plans.

    `host_params_per_s` is how fast the host updates parameters whose state it holds, by our kernel while copies
    run; `passing_params_per_s` how fast others pass through its memory to be updated on the device, which slows the
    host's updates; `torch_params_per_s` how fast a torch optimizer updates on the host, gradients and casts included.
    Where `overlaps`, copies and our updates run beside compute and cost only what compute does not hide.
    """

    flops_per_s: float
    bus_bytes_per_s: float
    host_params_per_s: float
    passing_params_per_s: float
    torch_params_per_s: float
    overlaps: bool


CUDA = Rates(
    flops_per_s=520e12, bus_bytes_per_s=28e9, host_params_per_s=5e9, passing_params_per_s=12e9,
    torch_params_per_s=3e9, overlaps=True,
)  # fmt: skip
"""Measured on H100 and H200 with PCIe 5 and 16 cores, both directions of the bus and the host's updates busy.

Fitted to profiles of OPT x 1024 on H100. Of 2.7B the device computed 3.5e14 FLOP in 0.638 s at batch 16 and 1.63e14
in 0.324 s at batch 8, that is 500 to 550 TFLOP/s. The host updated 79M parameters in 13 to 16 ms and 67M in 11 to
15 ms; where others were streamed, for which the bus gave 28 GB/s, in up to 22 ms.
"""

LAUNCH_S = 1.5e-3
"""What the launching thread needs to send one chunk's state through the device, in pieces."""

_INFINITE = float("inf")
ARENA = Rates(
    flops_per_s=50e9, bus_bytes_per_s=8e9, host_params_per_s=_INFINITE, passing_params_per_s=_INFINITE,
    torch_params_per_s=_INFINITE, overlaps=False,
)  # fmt: skip
"""One CPU: both tiers are the same memory and the same cores update on either side."""


class StepTime:
    """Modelled seconds of one training step of a program, by where its chunks live."""

    def __init__(self, program: Program, rates: Rates) -> None:
        self.rates = rates
        flops = dict.fromkeys(("forward", "backward"), 0)
        for node in program.computes:
            flops[note(node).phase] += _flops(node)
        self.forward_s, self.backward_s = (flops[phase] / rates.flops_per_s for phase in ("forward", "backward"))
        self.fetched = [int(fetch.args[0]) for fetch in program.calls(FETCH)]

    def seconds(self, plan: Plan, residency: Residency) -> float:
        """Compute, the copies it does not hide, and updates: a torch optimizer's come after them all."""
        chunks, rates = plan.layout.chunks, self.rates
        compute_s = self.forward_s + self.backward_s + LAUNCH_S * len(residency.streamed)
        on_host = [chunk for chunk in chunks if chunk.index not in residency.masters]
        trained = [chunk for chunk in on_host if chunk.trainable]
        if plan.updates is None:
            copied = {chunk.index: chunk.compute_bytes for chunk in on_host}
            once = sum(copied.get(index, 0) for index in residency.weights)
            copy_s = (once + self._streamed_bytes(on_host, residency)) / rates.bus_bytes_per_s
            update_s = sum(chunk.numel for chunk in trained) / rates.torch_params_per_s
            return compute_s + max(0.0, copy_s - compute_s * rates.overlaps) + update_s
        states = {c.index: plan.updates.master_bytes(c) + plan.updates.moment_bytes(c) for c in trained}
        travels = sum(states[index] for index in residency.streamed)
        refreshed = sum(c.shard_bytes for c in trained if c.index in residency.weights - residency.streamed)
        copy_s = (travels + refreshed + self._streamed_bytes(on_host, residency)) / rates.bus_bytes_per_s
        streamed = sum(c.shard_numel for c in trained if c.index in residency.streamed)
        updated = sum(c.shard_numel for c in trained) - streamed
        update_s = updated / rates.host_params_per_s + streamed / rates.passing_params_per_s
        # Updates run beside the next forward, which reads first what is updated first, and, with in_backward, beside
        # the backward before it. There gradients wait on the device for states to come by, which few can at a time.
        at_once = plan.updates.in_backward
        update_s -= (self.forward_s + self.backward_s * at_once) * rates.overlaps
        travel_s = travels / rates.bus_bytes_per_s
        travel_s -= (self.backward_s if at_once else self.forward_s) * rates.overlaps
        return compute_s + max(update_s, travel_s, copy_s - compute_s * rates.overlaps, 0.0)

    def _streamed_bytes(self, on_host: list[ChunkLayout], residency: Residency) -> int:
        """Bytes of weights that are copied for each use."""
        copied = {chunk.index: chunk.shard_bytes for chunk in on_host if chunk.index not in residency.weights}
        return sum(copied.get(index, 0) for index in self.fetched)


def _flops(node: torch.fx.Node) -> int:
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
