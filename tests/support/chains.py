"""Chains of equal blocks, each with a chunk of its own, so short that every plan for them can be weighed."""

import numpy as np
import torch
from geminifx.compiler.lowering import Flat
from geminifx.compiler.planner.liveness import ACTIVATIONS, Interval, Liveness
from geminifx.compiler.planner.timeline import Timed, Timeline
from geminifx.compiler.planner.weighed import Weighed
from geminifx.compiler.rates.rates import Products, Rates
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Program
from geminifx.passes.program.request import Request
from geminifx.runtime.isa.formats import StateFormat
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.instructions import ACCUMULATE_GRAD, FETCH, REDUCE, WAIT
from geminifx.runtime.isa.layout import ChunkLayout, Layout

PARAMS, KEPT_BYTES = 100, 600
"""Of a block: what it trains, and what its backward reads."""

# A block computes for a second and for two, and a copy of its weights, updates on the host and states on their way take
# as long as that, or less, or more.
RATES = Rates("a machine of few bytes", *(3 * [Products.of_any_size(1.0)]), memory_bytes_per_s=float("inf"),
              kernel_s=0.0, launch_s=0.0, up_bytes_per_s=200, down_bytes_per_s=200, both_bytes_per_s=150,
              host_params_per_s=60, passing_bytes_per_s=6600, torch_params_per_s=20, device_params_per_s=1000,
              network_bytes_per_s=100, network_latency_s=0.0, overlaps=True)  # fmt: skip
HOMES = [Home(where, stays) for where in Where for stays in (False, True)]


def chain(plan: Plan, blocks: int) -> Weighed:
    """Blocks one after the other, forward and back, each with a chunk of its own."""
    instructions, at_s, again = list[Timed](), 0.0, {int(name) for name in plan.recompute}
    for block in range(blocks):
        instructions += [(at_s, FETCH, block), (at_s, WAIT, block)]
        at_s += 1
    for block in reversed(range(blocks)):
        instructions += [(at_s, FETCH, block), (at_s, WAIT, block)]
        at_s += 3 if block in again else 2
        instructions += [(at_s, REDUCE, block), (at_s, ACCUMULATE_GRAD, block)]
    kept, none = np.zeros((2, 2 * blocks), dtype=np.int64)
    for block in range(blocks):
        last = 2 * blocks - 1 - block
        kept[last if block in again else block : last + 1] += KEPT_BYTES
    fetches = [Interval(block, at, at) for block in range(blocks) for at in (block, 2 * blocks - 1 - block)]
    liveness = Liveness({ACTIVATIONS: kept}, tuple(fetches), 0, 2 * blocks, none, none)
    return Weighed(Flat(Program("training")), liveness, Timeline.at(instructions, at_s))


def draft(blocks: int, format: StateFormat) -> Plan:
    chunks = (ChunkLayout(i, PARAMS, torch.bfloat16, torch.float32, True, ()) for i in range(blocks))
    return Plan(Request("auto"), layout=Layout(tuple(chunks)), format=format)


def names(blocks: int) -> tuple[str, ...]:
    return tuple(map(str, range(blocks)))
