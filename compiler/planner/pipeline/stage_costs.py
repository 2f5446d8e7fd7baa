"""The round-robin schedule that suits a program: of the seconds that its own stages take."""

from dataclasses import replace

from torch import fx

from ....passes.program.plan import Plan
from ....passes.program.program import Program, tensor_type
from ....passes.splitting.stages import Stages
from ....runtime.isa.schedule import Schedule
from ...rates.rates import Rates
from ..costs import is_free, kernel_s
from .round_robin import round_robin
from .simulate import StageCosts


def suited(program: Program, plan: Plan, recompute: tuple[str, ...] | None, rates: Rates) -> Schedule:
    """The round-robin schedule for the plan's stages, if the blocks `recompute` are computed again."""
    assert plan.schedule is not None
    costs = stage_costs(program, replace(plan, recompute=recompute or ()), rates)
    return round_robin(costs, len(plan.schedule.ranks), plan.schedule.microbatches)


def stage_costs(program: Program, plan: Plan, rates: Rates) -> list[StageCosts]:
    """What each stage of a host-weights schedule takes for one microbatch. Its backward computes the plan's recomputed
    blocks again; fetches of weights are taken to be hidden. Where the program is an evaluation's, which has no
    backward, gradients of inputs and of weights are taken to cost a forward each."""
    stages, found = Stages(program, plan), list[StageCosts]()
    trains = any(kind != "F" for _, kind in stages.work)
    for stage, begin in enumerate(plan.stages):
        forward, backward = (stages.work.get((stage, kind), []) for kind in ("F", "B"))
        again = forward if (begin or plan.blocks[0]) in plan.recompute else []
        forward_s, again_s = (_total_s(nodes, rates) for nodes in (forward, again))
        backward_s, weight_s = 2 * forward_s, forward_s
        if trains:
            backward_s = _total_s(backward, rates)
            weight_s = _total_s([node for node in backward if node not in stages.early], rates)
        sent = [node for node in forward if any(stages.stage.get(user, 0) > stage for user in node.users)]
        message_s = rates.exchange_s(len(sent), sum(tensor_type(node).num_bytes for node in sent))
        whole_s = again_s + backward_s
        found.append(StageCosts(forward_s, max(whole_s - weight_s, 0.0), weight_s, whole_s, message_s))
    return found


def _total_s(nodes: list[fx.Node], rates: Rates) -> float:
    return sum(kernel_s(node, rates) for node in nodes if not is_free(node))
