"""Schedules of any kind for property tests."""

from geminifx.compiler.planner.pipeline.schedules import KINDS, Shape, make_schedule
from geminifx.runtime.isa.schedule import Schedule
from hypothesis import strategies as st


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """One of any kind, of a shape that it fits."""
    name = draw(st.sampled_from(sorted(KINDS)))
    shapes = st.builds(Shape, st.integers(1, 6), st.integers(1, 14), st.integers(1, 3))
    return make_schedule(name, draw(shapes.filter(lambda shape: not KINDS[name].misfit(shape))))
