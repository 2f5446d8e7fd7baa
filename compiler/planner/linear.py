"""Integer programs, row by row, for scipy's HiGHS."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Columns:
    """Some of a program's variables, one after the other."""

    first: int
    count: int

    def of(self, coefficients: Iterable[float]) -> Terms:
        return {self.first + i: value for i, value in enumerate(coefficients) if value}

    def values(self, found: np.ndarray) -> list[float]:
        return [float(value) for value in found[self.first : self.first + self.count]]


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

    def minimise(self, cost: Terms) -> np.ndarray | None:
        """The variables' values; None where there are none."""
        entries = [(value, row, column) for row, (terms, *_) in enumerate(self.rows) for column, value in terms.items()]
        values, at_row, at_column = zip(*entries, strict=True)
        matrix = csr_array((values, (at_row, at_column)), shape=(len(self.rows), len(self.most)))
        costs = np.zeros(len(self.most))
        costs[list(cost)] = list(cost.values())
        _, least, most = zip(*self.rows, strict=True)
        found = milp(
            costs, constraints=LinearConstraint(matrix, least, most), bounds=Bounds(0, self.most),
            integrality=np.array(self.integer, int), options={"mip_rel_gap": GAP, "node_limit": MOST_NODES},
        )  # fmt: skip
        return None if found.x is None else np.asarray(found.x)
