"""The world that a model is planned for."""

from dataclasses import dataclass

from ....runtime.isa.precision import ReduceDtype
from ...rates.clusters import Cluster
from ...rates.rates import Rates

SHARES = tuple(step / 8 for step in range(9))
"""Of the blocks, that may be computed again."""


@dataclass(frozen=True)
class World:
    """What a model is planned for: a cluster whose devices do what `rates` say, and bytes that may be taken of each
    device and of its share of the host (None: any); `reserve_bytes` of the device's are not the tensors'. `examples`
    are a step's, of all processes. `fuses` tells whether the loss over a vocabulary may be computed in pieces,
    `reduce_dtype` in what gradients are added up, `recomputed` which shares of the blocks may be computed again, the
    least first, `optimizer_state_bytes` what the optimizer keeps of a parameter."""

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
