"""The bus: each direction at its own rate alone, and slower while the other is busy."""

from dataclasses import replace

import pytest
from geminifx.compiler.planner.bus import Bus
from geminifx.compiler.rates.rates import ARENA
from hypothesis import given
from hypothesis import strategies as st

RATES = replace(ARENA, up_bytes_per_s=100, down_bytes_per_s=50, both_bytes_per_s=25)


def test_alone_each_direction_has_its_own_rate() -> None:
    bus = Bus(RATES)
    assert bus.to_device(200, 1.0) == 3.0
    assert bus.to_host(200, 10.0) == 14.0
    assert (bus.up.busy_s, bus.down.busy_s) == (2.0, 4.0)


def test_both_at_once_are_slower() -> None:
    bus = Bus(RATES)
    bus.to_device(1000, 0.0)  # until 10
    assert bus.to_host(100, 2.0) == 2.0 + 100 / 25


def test_a_copy_is_slower_for_as_long_as_the_other_direction_is_busy() -> None:
    bus = Bus(RATES)
    bus.to_device(400, 2.0)  # until 6
    # From 0 to 2 alone: 100 bytes; until 6 beside the other: 100; the last 100 alone again.
    assert bus.to_host(300, 0.0) == 6.0 + 2.0
    assert bus.down.busy_s == 8.0


def test_copies_that_touch_are_one_stretch_for_the_other_direction() -> None:
    bus = Bus(RATES)
    bus.to_device(200, 0.0)
    bus.to_device(200, 2.0)
    assert bus.to_host(100, 0.0) == 4.0
    apart = Bus(RATES)
    apart.to_device(200, 0.0)
    apart.to_device(200, 8.0)
    assert apart.to_host(100, 3.0) == 5.0, "in between nothing comes"


def test_what_goes_through_uses_both() -> None:
    bus = Bus(RATES)
    assert bus.through(100, 50, 1.0) == 5.0
    assert (bus.up.busy_s, bus.down.busy_s) == (4.0, 2.0)
    assert bus.to_host(25, 2.0) == 3.0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 500), st.integers(0, 20)), max_size=8))
def test_no_copy_is_faster_than_alone_or_slower_than_beside_the_other(copies: list[tuple[bool, int, int]]) -> None:
    bus = Bus(RATES)
    for up, num_bytes, begin_s in copies:
        end_s = (bus.to_device if up else bus.to_host)(num_bytes, begin_s)
        alone_s = num_bytes / (100 if up else 50)
        assert begin_s + alone_s <= end_s * (1 + 1e-12) + 1e-12
        assert end_s <= (begin_s + num_bytes / 25) * (1 + 1e-12)


def test_where_both_directions_are_as_fast_together_nothing_changes() -> None:
    bus = Bus(replace(RATES, up_bytes_per_s=100, down_bytes_per_s=100, both_bytes_per_s=100))
    bus.to_device(700, 0.0)
    assert bus.to_host(300, 1.0) == pytest.approx(4.0)
