"""Integer programs, row by row, for scipy's HiGHS."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

GAP = 0.02
"""An answer is good enough that is off by no more than this share: rates are not known better, and the clock is asked
beside the program."""

MOST_NODES = 2000
"""So far a search goes, and not for so many seconds: all processes are to find the same."""

Terms = dict[int, float]
"""Coefficients by column."""

_Items = tuple[tuple[int, float], ...]
"""The same, to be compared by."""


@dataclass(frozen=True)
class Columns:
    """Some of a program's variables, one after the other."""

    first: int
    count: int

    def of(self, coefficients: Iterable[float]) -> Terms:
        return {self.first + i: value for i, value in enumerate(coefficients) if value}

    def values(self, found: Sequence[float]) -> Sequence[float]:
        return found[self.first : self.first + self.count]


@dataclass
class Rows:
    """A program in the making: all variables are 0 or more."""

    most: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[Terms, float, float]] = field(default_factory=list)

    def columns(self, most: Sequence[float], *, integer: bool = False) -> Columns:
        """New variables, of which each is at most so much."""
        made = Columns(len(self.most), len(most))
        self.most += most
        self.integer += [integer] * len(most)
        return made

    def add(self, terms: Terms, most: float, least: float = -np.inf) -> None:
        self.rows.append((terms, least, most))

    def minimise(self, cost: Terms) -> tuple[float, ...] | None:
        """The variables' values; None where there are none."""
        rows = tuple((tuple(terms.items()), least, most) for terms, least, most in self.rows)
        return _minimum(tuple(cost.items()), rows, tuple(self.most), tuple(self.integer))


@lru_cache(maxsize=1024)
def _minimum(cost: _Items, rows: tuple[tuple[_Items, float, float], ...], most: tuple[float, ...],
             integer: tuple[bool, ...]) -> tuple[float, ...] | None:  # fmt: skip
    """One search weighs a lowered program several times, and for each format of training state: what differs between
    these is often not in the program."""
    entries = [(value, row, column) for row, (terms, *_) in enumerate(rows) for column, value in terms]
    values, at_row, at_column = zip(*entries, strict=True)
    matrix = csr_array((values, (at_row, at_column)), shape=(len(rows), len(most)))
    costs = np.zeros(len(most))
    for column, value in cost:
        costs[column] = value
    _, lower, upper = zip(*rows, strict=True)
    found = milp(
        costs, constraints=LinearConstraint(matrix, lower, upper), bounds=Bounds(0, most),
        integrality=np.array(integer, int), options={"mip_rel_gap": GAP, "node_limit": MOST_NODES},
    )  # fmt: skip
    return None if found.x is None else tuple(found.x.tolist())
