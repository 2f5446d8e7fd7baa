"""Architectures of transformers: a compiled one computes what plain PyTorch does, or is refused with a reason.

Run whole, it writes the table of docs/architectures.md.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from architectures import names, supported
from support_table import record

SIZE = len(names())
TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore")
def test_architectures_are_right_or_refused(cases: Iterator[int], request: pytest.FixtureRequest) -> None:
    rows = [supported(names()[number]) for number in cases]
    if request.config.getoption("--whole"):
        record(rows, TABLE)
    assert [fault for row in rows for fault in row.faults] == []
