"""Schedules of any kind for property tests."""

from itertools import product

from geminifx.compiler.planner.pipeline.schedules import KINDS, Shape, make_schedule
from hypothesis import strategies as st

FITTING = [
    (name, shape)
    for shape in (Shape(*counts) for counts in product(range(1, 6), range(1, 12), range(1, 4)))
    for name in KINDS
    if not KINDS[name].misfit(shape)
]

schedules = st.sampled_from(FITTING).map(lambda fitting: make_schedule(*fitting))
"""One of any kind, of a shape that it fits, the smallest first."""
