"""Where a pipeline's stages begin, so that the slowest takes as little as possible, and who has which parameters."""

from dataclasses import replace
from functools import cache
from itertools import accumulate

from ....passes.program.plan import Plan
from ....passes.program.program import Program
from ....passes.splitting.stages import Stages
from ....runtime.isa.errors import ArgumentError
from ....runtime.isa.layout import Owners
from ...rates.rates import Rates
from ..costs import is_free, kernel_s


def begins(program: Program, plan: Plan, rates: Rates) -> tuple[str, ...]:
    """The first block of each stage of the plan's schedule; "" stands for the model's beginning.

    Raises ArgumentError where there are fewer blocks than stages.
    """
    assert plan.schedule is not None
    count, blocks = plan.schedule.stages, plan.blocks
    if count > max(len(blocks), 1):
        raise ArgumentError(
            f"a pipeline of {count} stages needs at least {count} blocks, but the model has {len(blocks)}: "
            f"{', '.join(blocks) or 'no list of layers was found'}; choose fewer stages"
        )
    if count == 1:
        return ("",)
    starts = balanced(_seconds(program, plan, rates), count)
    return ("", *(blocks[start] for start in starts[1:]))


def owners(program: Program, plan: Plan, names: tuple[str, ...]) -> dict[str, Owners]:
    """The pipeline ranks that read each parameter; empty where there is only one rank."""
    assert plan.schedule is not None
    ranks = range(len(plan.schedule.ranks))
    if len(ranks) == 1:
        return {}
    stages = Stages(program, plan)
    held = [stages.parameters(rank) for rank in ranks]
    return {name: tuple(rank for rank in ranks if name in held[rank]) for name in names}


def _seconds(program: Program, plan: Plan, rates: Rates) -> list[float]:
    """Forward and backward seconds of each block, with what runs beside it, such as the embedding or the loss."""
    alone = Stages(program, replace(plan, stages=("", *plan.blocks[1:])))
    seconds = [0.0] * len(plan.blocks)
    for node, block in alone.stage.items():
        if not is_free(node):
            seconds[block] += kernel_s(node, rates)
    return seconds


def balanced(seconds: list[float], count: int) -> list[int]:
    """Where each of `count` runs of neighbours begins, so that the largest sum of a run is as small as possible; among
    equal cuts, later runs are shorter."""
    sums = [0.0, *accumulate(seconds)]

    @cache
    def best(runs: int, end: int) -> tuple[float, int]:
        """The largest sum, and where the last run begins."""
        if runs == 1:
            return sums[end], 0
        return min(
            ((max(best(runs - 1, begin)[0], sums[end] - sums[begin]), begin) for begin in range(runs - 1, end)),
            key=lambda found: (found[0], -found[1]),
        )

    starts, end = list[int](), len(seconds)
    for runs in range(count, 0, -1):
        end = best(runs, end)[1]
        starts.append(end)
    return starts[::-1]
