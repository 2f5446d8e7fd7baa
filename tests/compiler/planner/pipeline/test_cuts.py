"""Where stages begin: the slowest of them takes as little as can be."""

from itertools import combinations, pairwise

from geminifx.compiler.planner.pipeline.cuts import balanced
from hypothesis import given
from hypothesis import strategies as st


def slowest(seconds, starts):
    return max(sum(seconds[a:b]) for a, b in pairwise([*starts, len(seconds)]))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 8))
def test_no_other_cuts_are_better(seconds, count):
    count = min(count, len(seconds))
    starts = balanced([float(s) for s in seconds], count)
    assert starts[0] == 0 and len(starts) == count and starts == sorted(set(starts))
    every = ([0, *cuts] for cuts in combinations(range(1, len(seconds)), count - 1))
    assert slowest(seconds, starts) == min(slowest(seconds, other) for other in every)


def test_a_slow_end_is_a_stage_of_fewer_blocks():
    assert balanced([1.0] * 6 + [4.0], 3) == [0, 3, 6]
    assert balanced([1.0, 1.0, 1.0], 2) == [0, 2]
