"""A plan with the program it was made for, and the estimate of what that takes."""

from dataclasses import dataclass, replace

from ...passes.program.plan import Plan
from ...passes.program.program import Program
from ..lowering import Flat
from .communication import collectives
from .memory import Limits, Memory
from .simulate import StepTime
from .weighed import Weighed


@dataclass(frozen=True)
class Solution:
    """A plan, and the program it was made for."""

    plan: Plan
    flat: Flat

    @property
    def program(self) -> Program:
        return self.flat.program


def step_s(solution: Solution) -> float:
    return solution.plan.estimate.step_s


def solution_of(plan: Plan, flat: Flat, memory: Memory, time: StepTime) -> Solution:
    """A fully decided plan, with the estimate of what it takes."""
    timing = time.timing(plan, plan.homes)
    estimate = replace(
        memory.estimate(plan.homes), step_s=timing.step_s, busy_s=timing.busy_s, rates=time.rates.name,
        collectives=collectives(flat.program, plan),
    )  # fmt: skip
    return Solution(replace(plan, estimate=estimate, alternatives=()), flat)


def estimated(plan: Plan, program: Program, limits: Limits) -> Solution:
    """The plan unchanged, with a new estimate for its program, which is already running."""
    weighed = Weighed.of(Flat(program, ()), plan, limits.rates)
    return solution_of(plan, weighed.flat, *weighed.on(plan, limits))
