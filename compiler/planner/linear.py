"""Integer programs, row by row, for scipy's HiGHS."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

GAP = 0.02
"""The relative gap of a good enough answer: rates are not known better, and the clock decides among answers."""

MOST_NODES = 2000
"""A search stops after this many nodes and not after some seconds, so that all processes find the same answer."""

Terms = dict[int, float]
"""Coefficients by column."""

_Items = tuple[tuple[int, float], ...]
"""Terms in hashable form, as a key of the cache."""


@dataclass(frozen=True)
class Columns:
    """A range of consecutive variables."""

    first: int
    count: int

    def of(self, coefficients: Iterable[float]) -> Terms:
        return {self.first + i: value for i, value in enumerate(coefficients) if value}

    def values(self, found: Sequence[float]) -> Sequence[float]:
        return found[self.first : self.first + self.count]


@dataclass
class Rows:
    """A program under construction; all variables are at least 0."""

    most: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[Terms, float, float]] = field(default_factory=list)

    def columns(self, most: Sequence[float], *, integer: bool = False) -> Columns:
        """Adds variables, each with its upper bound."""
        made = Columns(len(self.most), len(most))
        self.most += most
        self.integer += [integer] * len(most)
        return made

    def add(self, terms: Terms, most: float, least: float = -np.inf) -> None:
        self.rows.append((terms, least, most))

    def minimise(self, cost: Terms) -> tuple[float, ...] | None:
        """The values of all variables at the minimum; None where there is no solution."""
        rows = tuple((tuple(terms.items()), least, most) for terms, least, most in self.rows)
        return _minimum(tuple(cost.items()), rows, tuple(self.most), tuple(self.integer))


@lru_cache(maxsize=1024)
def _minimum(cost: _Items, rows: tuple[tuple[_Items, float, float], ...], most: tuple[float, ...],
             integer: tuple[bool, ...]) -> tuple[float, ...] | None:  # fmt: skip
    """Solves a program. Cached: a search weighs a lowered program several times, and again for each format of training
    state, often with the same rows."""
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
