"""The text of --parallel: what it means, and what a wrong one is told."""

from typing import Any

import pytest
from geminifx.compiler.parallel import Parallel, parse_parallel


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Parallel()),
        ("data=2", Parallel(data=2)),
        ("data=2, tensor=2.5d:8:2", Parallel(data=2, mode="2.5d", size=8, depth=2)),
        ("zero=3,tensor=1d:4,sequence", Parallel(zero=3, mode="1d", size=4, sequence=True)),
    ],
)
def test_text_means_degrees(text: str, expected: Any) -> None:
    assert Parallel.of(parse_parallel(text)) == expected


@pytest.mark.parametrize(
    "text",
    ["data", "data=x", "dat=2", "data=2,data=2", "tensor=1d", "tensor=1d:2:2", "tensor=9d:4", "zero=7", "sequence"],
)
def test_a_wrong_text_is_told_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match=r"--parallel .*tensor=MODE:SIZE .* such as data=2,tensor=2\.5d:8:2"):
        parse_parallel(text)
