"""What measured steps tell about the machine: how much slower it is than its rates say, and how much more memory it
takes than planned.

Copies and the host's updates are measured directly. The rest of a step's measured time is attributed to compute, as far
as slower compute makes the modelled step longer, within bounds. Where something else bounds the step, everything is
slowed by the same factor.
"""

from dataclasses import astuple, dataclass, replace

from ...passes.program.plan import Plan
from ...passes.program.program import Program
from ..rates.rates import Slowdown
from .memory import Limits
from .simulate import HOST, StepTime
from .timeline import Carrier, timeline

MOST = 8.0
"""A single measured ratio counts as no more than this many times slower or faster than modelled."""

WORTH = 0.01
"""Copies or updates tell their speed only where they take more than this share of the modelled step."""

HALVINGS = 20


@dataclass(frozen=True)
class MeasuredStep:
    """A measured training step: seconds in all, of copies each way and of host updates, and the device's peak bytes."""

    step_s: float
    up_s: float
    down_s: float
    host_s: float
    peak_bytes: int

    @classmethod
    def slowest(cls, found: list["MeasuredStep"]) -> "MeasuredStep":
        """The maximum of each field over processes: all wait for the slowest, and all need room for the largest."""
        return cls(*map(max, zip(*map(astuple, found), strict=True)))


def corrected(limits: Limits, plan: Plan, program: Program, measured: MeasuredStep) -> Limits:
    """The limits of a machine on which this plan's program takes what was measured."""
    more_bytes = max(0, measured.peak_bytes - plan.peak_bytes)
    slowdown = _slowdown(limits, plan, program, measured)
    return replace(limits, rates=limits.rates.slowed(slowdown), reserve_bytes=limits.reserve_bytes + more_bytes)


def _slowdown(limits: Limits, plan: Plan, program: Program, measured: MeasuredStep) -> Slowdown:
    modelled = timeline(program, plan, limits.rates)
    timing = StepTime(modelled, limits.rates).timing(plan, plan.homes)
    busy_s = dict(timing.busy_s)

    def factor(resource: str, seconds: float) -> float:
        planned_s = busy_s.get(resource, 0.0)
        return _bounded(seconds / planned_s) if planned_s > WORTH * timing.step_s and seconds else 1.0

    up, down = factor(Carrier.UP.value, measured.up_s), factor(Carrier.DOWN.value, measured.down_s)
    beside = Slowdown(up=up, down=down, host=factor(HOST, measured.host_s))

    def step_s(compute: float) -> float:
        rates = limits.rates.slowed(replace(beside, compute=compute))
        return StepTime(modelled.slowed(compute), rates).seconds(plan, plan.homes)

    ratio = _bounded(measured.step_s / step_s(1.0))
    low, high = sorted((1.0, ratio**2))
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if step_s(middle) < measured.step_s else (low, middle)
    rest = measured.step_s / step_s(high)
    return Slowdown(high * rest, beside.up * rest, beside.down * rest, beside.host * rest)


def _bounded(factor: float) -> float:
    return min(MOST, max(1 / MOST, factor))
