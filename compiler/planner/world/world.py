"""The world that a model is planned for."""

from dataclasses import dataclass

from ....runtime.isa.precision import ReduceDtype
from ...rates.clusters import Cluster
from ...rates.rates import Rates

SHARES = tuple(step / 8 for step in range(9))
"""The shares of the blocks that may be recomputed."""


@dataclass(frozen=True)
class World:
    """What a model is planned for.

    Fields:
        cluster, rates: the devices' network, and what each device does in a second.
        examples: the examples of a step, over all processes.
        device_bytes, host_bytes: the budget of each device, and of its share of the host; None: no limit.
        fuses: whether the loss over a vocabulary may be computed in pieces.
        reduce_dtype: the dtype that gradients are reduced in.
        recomputed: the shares of the blocks that may be recomputed, in rising order.
        optimizer_state_bytes: what the optimizer keeps per parameter.
        reserve_bytes: the part of the device's budget that is not for tensors.
    """

    cluster: Cluster
    rates: Rates
    examples: int
    device_bytes: int | None = None
    host_bytes: int | None = None
    fuses: bool = True
    reduce_dtype: ReduceDtype = "fp32"
    recomputed: tuple[float, ...] = SHARES
    optimizer_state_bytes: int = 8
    reserve_bytes: int = 0
