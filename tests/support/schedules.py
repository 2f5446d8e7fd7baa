"""Schedules for tests: of any kind, and a round-robin that exchanges much."""

from itertools import product

from geminifx.compiler.planner.pipeline.schedules import KINDS, Shape, make_schedule
from geminifx.runtime.isa.schedule import ROUND_ROBIN, Action, Schedule
from hypothesis import strategies as st

FITTING = [
    (name, shape)
    for shape in (Shape(*counts) for counts in product(range(1, 6), range(1, 12), range(1, 4)))
    for name in KINDS
    if not KINDS[name].misfit(shape)
]

schedules = st.sampled_from(FITTING).map(lambda fitting: make_schedule(*fitting))
"""One of any kind, of a shape that it fits, the smallest first."""


def in_turns(stages: int, ranks: int, microbatches: int) -> Schedule:
    """A round-robin in which another rank runs a stage's backwards than its forwards, but for the last stage's."""
    turns: list[list[Action]] = [[] for _ in range(ranks)]
    last, every = stages - 1, range(microbatches)
    for stage in range(last):
        turns[stage % ranks] += [Action(stage, microbatch, "F") for microbatch in every]
    for microbatch in every:
        turns[last % ranks] += [Action(last, microbatch, "F"), Action(last, microbatch, "B")]
    for stage in reversed(range(last)):
        turns[(stage + 1) % ranks] += [Action(stage, microbatch, "B") for microbatch in every]
    return Schedule(ROUND_ROBIN, stages, microbatches, tuple(map(tuple, turns)), "host")
