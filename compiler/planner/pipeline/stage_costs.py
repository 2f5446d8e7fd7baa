"""The round-robin schedule that suits a program: of the seconds that its own stages take."""

from dataclasses import replace

from torch import fx

from ....passes.program.plan import Plan
from ....passes.program.program import Program, note, tensor_type
from ....passes.splitting.parts import block_finder
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
    blocks again, but no embedding or head beside them; fetches of weights are taken to be hidden. Where the program is
    an evaluation's, which has no backward, gradients of inputs and of weights are taken to cost a forward each."""
    stages, found = Stages(program, plan), list[StageCosts]()
    trains = any(kind != "F" for _, kind in stages.work)
    block_of = block_finder(plan.blocks)
    outputs = dict.fromkeys(program.results_of("output").values())
    told = [node for node in outputs if node in stages.stage and stages.is_told(node)]
    for stage in range(len(plan.stages)):
        forward, backward = (stages.work.get((stage, kind), []) for kind in ("F", "B"))
        again = [node for node in forward if block_of(note(node).module) in plan.recompute]
        forward_s, again_s = (_total_s(nodes, rates) for nodes in (forward, again))
        backward_s, weight_s = 2 * forward_s, forward_s
        if trains:
            backward_s = _total_s(backward, rates)
            weight_s = _total_s([node for node in backward if node not in stages.early], rates)
        sent = [node for node in forward if any(stages.stage.get(user, 0) > stage for user in node.users)]
        sent += told if stage + 1 == len(plan.stages) else []
        message_s = rates.exchange_s(len(sent), sum(tensor_type(node).num_bytes for node in sent))
        whole_s = again_s + backward_s
        found.append(StageCosts(forward_s, max(whole_s - weight_s, 0.0), weight_s, whole_s, message_s))
    return found


def _total_s(nodes: list[fx.Node], rates: Rates) -> float:
    return sum(kernel_s(node, rates) for node in nodes if not is_free(node))
