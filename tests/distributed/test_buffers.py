"""Ranks with batches of their own have the buffers that torch's DistributedDataParallel has, and save them."""

import sys
from pathlib import Path

import torch
from launching import ranks_of

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def test_what_a_forward_writes_is_the_first_ranks(tmp_path: Path) -> None:
    assert [code for code, _ in ranks_of(HERE / "buffers.py", str(tmp_path), ranks=2)] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert set(first) == {"data", "zero 3"}
    for way, one in first.items():
        other = second[way]
        for name, value in one["ours"].items():
            assert torch.equal(value, other["ours"][name]), (way, name)
            torch.testing.assert_close(value, one["theirs"][name])
        for found in (one, other):
            assert found["on"] == found["resumed"], way
            torch.testing.assert_close(*map(torch.tensor, zip(*found["losses"], strict=True)))
