"""Request: what the user declared about training a model. Planners and passes follow it and never change it."""

from dataclasses import dataclass
from typing import Literal

from ...runtime.isa.precision import ReduceDtype

Policy = Literal["cuda", "cpu", "auto"]
"""Where training state should live: on the device, on the host, or on the device as far as the budget allows. Set by
the argument `placement=`."""

Outputs = Literal["loss", "all"]
Kernels = Literal["exact", "fused"]


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Fields:
        policy: where training state should live; in a plan that was fed back, the policy it was made under.
        budget_bytes: device memory the process may use, or None for all of it.
        outputs: which outputs of a sharded training step are gathered: only the "loss", if it is the one output with a
            gradient, or "all".
        mode: how processes shard tensors, a key of `passes.sharding.modes.MODES`; "" if they do not.
        sequence: whether the mode "1d" shards activations along the sequence.
        table: the user's own placements, as pairs of a parameter-name pattern and a placement: ("lm_head.*", "col=S0").
        zero: the ZeRO stage, that is, what replicas divide among them: 1 and 2 optimizer state and gradients, 3 also
            weights; 0 nothing.
        reduce_dtype: the dtype in which replicas sum gradients: "fp32", with one rounding of the mean, or "compute",
            the dtype in which the gradients are computed.
        kernels: "exact" runs torch's kernels, one per operator; "fused" compiles the operators between matrix products,
            which rounds differently.
    """

    policy: Policy = "auto"
    budget_bytes: int | None = None
    outputs: Outputs = "loss"
    mode: str = ""
    sequence: bool = False
    table: tuple[tuple[str, str], ...] = ()
    zero: int = 0
    reduce_dtype: ReduceDtype = "fp32"
    kernels: Kernels = "exact"
