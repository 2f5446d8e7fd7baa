"""Campaigns: thousands of random cases of one property, numbered, so that a case is the same wherever it runs.

`make campaigns` runs all of them; without `--whole` a twentieth runs, which is always the same.
"""

import random
from collections.abc import Iterator

import pytest

PARTS = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize("part", range(PARTS) if whole else [0])


@pytest.fixture
def cases(request: pytest.FixtureRequest, part: int) -> Iterator[int]:
    """The numbers of a part's cases, of `SIZE` in the test's module."""
    numbers = list(range(request.module.SIZE))
    random.Random(0).shuffle(numbers)
    mine = numbers[part::PARTS]
    request.node.user_properties.append(("cases", len(mine)))
    return iter(mine)
