"""Request: what the user declared about training a model. Planners and passes keep to it and never change it."""

from dataclasses import dataclass
from typing import Literal

from ...runtime.isa.precision import ReduceDtype

Policy = Literal["cuda", "cpu", "auto"]
"""Where the training state is to lie: on the device, on the host, or on the device as far as the budget reaches. It is
what the argument `placement=` says."""

Outputs = Literal["loss", "all"]
Kernels = Literal["exact", "fused"]


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Fields:
        policy: where the training state is to lie. Of a plan that was fed back, the policy it was made under.
        budget_bytes: device memory the process may use, or None for all there is.
        outputs: which outputs of a training step whose tensors are sharded are put together: the "loss", where that is
            the one with a gradient, or "all".
        mode: how processes shard tensors, a key of `passes.sharding.modes.MODES`; "" where they do not.
        sequence: whether the mode "1d" shards activations along the sequence.
        table: placements of the user's own, from patterns of parameter names, such as ("lm_head.*", "col=S0").
        zero: what processes with the same weights hold a part of: 1 optimizer state, 2 and gradients, 3 and weights.
        reduce_dtype: in what processes with the same weights add up gradients: "fp32", rounding their mean once, or
            "compute", the dtype they are computed in.
        kernels: "exact" runs torch's, one for each operator; "fused" compiles what lies between products, which rounds
            otherwise.
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
