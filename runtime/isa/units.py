"""Amounts as people write and read them: `parse_bytes("24GB")`, `format_bytes(24 * 10**9)`, `parse_seconds("10min")`,
`format_seconds(0.1)`."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_DECIMAL = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNIT_BYTES = _DECIMAL | _BINARY
_AMOUNT = re.compile(r"\s*([+-]?(?:\d[\d_]*(?:\.\d*)?|\.\d+))\s*([a-zA-Z]*|%)\s*", re.ASCII)
_UNIT_S = {"s": 1, "min": 60, "h": 3600}
_EXPECTED = 'a number of bytes or text such as "24GB" (10^9), "24GiB" (2^30), "512MB" or "80%"'


def parse_bytes(amount: str | int | float, *, of: int | None = None) -> int:
    """Returns `amount` in bytes, rounded down.

    A percentage is taken of `of` bytes (the device's or the host's total).

    Raises:
        ValueError: the amount is not understood, not positive, not finite, above 100%, or a percentage without `of`.
    """
    if isinstance(amount, bool) or not isinstance(amount, (str, int, float)):
        raise ValueError(f"a memory budget of {amount!r} is not an amount of memory; expected {_EXPECTED}")
    if isinstance(amount, str):
        count = _parse_text(amount, of)
    elif math.isfinite(amount):
        count = math.floor(amount)
    else:
        raise ValueError(f"a memory budget cannot be {amount}; expected {_EXPECTED}")
    if count < 1:
        raise ValueError(f"a memory budget must be at least one byte, but {amount!r} is less; expected {_EXPECTED}")
    return count


def _parse_text(text: str, of: int | None) -> int:
    """Returns the bytes that `text` names, which may still be zero or negative."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read {text!r} as an amount of memory; expected {_EXPECTED}")
    number, unit = Fraction(match[1].replace("_", "")), match[2].lower()
    if unit == "%":
        return _share(number, of, text)
    if unit not in _UNIT_BYTES:
        known = ", ".join(["B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB", "%"])
        raise ValueError(f"unknown unit {match[2]!r} in {text!r}; the units are {known}")
    return math.floor(number * _UNIT_BYTES[unit])


def _share(percent: Fraction, of: int | None, text: str) -> int:
    """Returns `percent` of `of` bytes."""
    if of is None:
        raise ValueError(f"{text!r} is a percentage of an unknown total; give the amount in bytes, such as '24GB'")
    if percent > 100:
        raise ValueError(f"{text!r} is more than the memory that exists; a percentage is at most 100%")
    return math.floor(percent * of / 100)


def parse_seconds(text: str) -> float:
    """Returns a duration such as "90s", "10min" or "1.5h" in seconds.

    Raises:
        ValueError: it is not understood, or not above zero.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in _UNIT_S or Fraction(match[1].replace("_", "")) <= 0:
        raise ValueError(f'cannot read {text!r} as a duration; expected for example "90s", "10min" or "1.5h"')
    return float(Fraction(match[1].replace("_", "")) * _UNIT_S[match[2].lower()])


def format_bytes(count: int) -> str:
    """Formats `count` bytes with three significant digits and a decimal unit: "1.32 GB"."""
    sign = "-" if count < 0 else ""
    return sign + _format(float(abs(count)), ("B", "kB", "MB", "GB", "TB"))


def format_seconds(duration_s: float) -> str:
    """Formats a duration of 0 or more seconds with three significant digits and a unit: "147 ms"."""
    return _format(duration_s * 1e9, ("ns", "us", "ms", "s"))


def _format(amount: float, units: tuple[str, ...]) -> str:
    """Formats `amount`, given in the first unit, in the unit that reads best; each unit is 1000 times the one before.
    Amounts in the first unit have no decimals."""
    for unit in units:
        digits = 0 if unit == units[0] else max(0, 2 - int(math.log10(max(amount, 1.0))))
        # 999.6 would round to a fourth digit; it belongs to the next unit.
        if round(amount, digits) < 1000 or unit == units[-1]:
            return f"{amount:.{digits}f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable: the loop returns at its last unit")
