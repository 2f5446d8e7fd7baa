"""Amounts of memory and durations as people write and read them."""

import pytest
from geminifx.runtime.isa.units import format_bytes, format_seconds, parse_bytes, parse_seconds
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1, 1),
        (24_000_000_000, 24 * 10**9),
        (24e9, 24 * 10**9),
        ("24GB", 24 * 10**9),
        ("24gb", 24 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("1.5 GB", 1_500_000_000),
        (" 512MB ", 512 * 10**6),
        (".5kB", 500),
        ("0.1GB", 10**8),
        ("1_000", 1000),
        ("12 b", 12),
        ("2TiB", 2 * 2**40),
    ],
)
def test_reads_amounts(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


def test_reads_a_share_of_a_total() -> None:
    assert parse_bytes("80%", of=1000) == 800
    assert parse_bytes("12.5 %", of=1000) == 125
    assert parse_bytes("100%", of=7) == 7


@pytest.mark.parametrize(
    ("amount", "says"),
    [
        ("24 potatoes", "unknown unit 'potatoes'"),
        ("", "cannot read ''"),
        ("GB", "cannot read"),
        ("1.2.3GB", "cannot read"),
        ("nan", "cannot read"),
        ("24 000 MB", "cannot read"),
        ("٢٤GB", "cannot read"),
        (0, "at least one byte"),
        ("0GB", "at least one byte"),
        (-5, "at least one byte"),
        ("-1GB", "at least one byte"),
        ("0.1B", "at least one byte"),
        (float("nan"), "cannot be nan"),
        (float("inf"), "cannot be inf"),
        (True, "is not an amount of memory"),
        (None, "is not an amount of memory"),
        ("80%", "unknown total"),
    ],
)
def test_refuses_nonsense(amount: str | int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_bytes(amount)


def test_refuses_more_than_everything() -> None:
    with pytest.raises(ValueError, match="at most 100%"):
        parse_bytes("101%", of=10**9)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (24 * 10**9, "24.0 GB"),
        (1_315_758_080, "1.32 GB"),
        (5 * 10**15, "5000 TB"),
        (-2048, "-2.05 kB"),
    ],
)
def test_formats_for_reading(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.0, "0 ns"),
        (3e-9, "3 ns"),
        (35.25e-6, "35.2 us"),
        (0.1474, "147 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1.00 s"),
        (1.316, "1.32 s"),
        (59.96, "60.0 s"),
        (4321.0, "4321 s"),
    ],
)
def test_formats_durations_for_reading(duration_s: float, text: str) -> None:
    assert format_seconds(duration_s) == text


@given(st.integers(min_value=1, max_value=10**15))
def test_what_is_printed_reads_back(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.006)


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert parse_bytes(text, of=10**9) >= 1
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(("text", "duration_s"), [("90s", 90), ("10min", 600), ("1.5 h", 5400), (".5S", 0.5)])
def test_reads_durations(text: str, duration_s: float) -> None:
    assert parse_seconds(text) == duration_s


@pytest.mark.parametrize("text", ["", "10", "10m", "0min", "-1h", "h", "1d", "nan s"])
def test_what_is_no_duration_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r'as a duration; expected for example "90s", "10min"'):
        parse_seconds(text)
