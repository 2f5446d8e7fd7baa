"""Blocks of tokens: split, order, resumability."""

import numpy as np
import pytest
import torch
from geminifx.models.recipe.blocks import TokenBlocks
from hypothesis import given, settings
from hypothesis import strategies as st


def _blocks(count: int, seed: int = 0) -> TokenBlocks:
    """Blocks of two tokens; block i holds i, i."""
    return TokenBlocks(np.repeat(np.arange(count), 2), 2, held_out=0.1, seed=seed)


def test_split_and_epochs() -> None:
    blocks = _blocks(40)
    held_out = {int(x) for batch, _ in blocks.held_out_batches(2) for x in batch["input_ids"][:, 0]}
    assert held_out == {9, 19, 29, 39}
    first, second = (
        [int(x) for step in range(e * 9, e * 9 + 9) for x in blocks.batch(step, 4)["input_ids"][:, 0]] for e in (0, 1)
    )
    assert sorted(first) == sorted(second) == sorted(set(range(40)) - held_out)
    assert first != second != sorted(second)
    assert {int(x) for b, _ in _blocks(40, seed=1).held_out_batches(2) for x in b["input_ids"][:, 0]} == held_out


@settings(max_examples=50)
@given(
    st.integers(2, 60),
    st.integers(1, 7),
    st.integers(0, 2**31),
    st.lists(st.integers(0, 500), min_size=2, max_size=6),
)
def test_a_batch_depends_on_seed_and_step_alone(count: int, batch_size: int, seed: int, steps: list[int]) -> None:
    used, expected = _blocks(count, seed), {}
    for step in steps:
        batch = used.batch(step, batch_size)
        assert batch["input_ids"].shape == (batch_size, 2) and torch.equal(batch["input_ids"], batch["labels"])
        expected[step] = batch["input_ids"]
    for step in reversed(steps):
        assert torch.equal(_blocks(count, seed).batch(step, batch_size)["input_ids"], expected[step])


def test_held_out_batches_have_one_shape() -> None:
    assert [len(b["labels"]) for b, _ in _blocks(50).held_out_batches(2)] == [2, 2]
    assert [len(b["labels"]) for b, _ in _blocks(50).held_out_batches(8)] == [5]
    assert len(list(_blocks(50).held_out_batches(1, limit=3))) == 3
    assert _blocks(50).held_out_count + len(_blocks(50)) == 50


def test_fingerprint_follows_data_and_order() -> None:
    assert _blocks(20).fingerprint() == _blocks(20).fingerprint()
    assert len({_blocks(20).fingerprint(), _blocks(21).fingerprint(), _blocks(20, seed=1).fingerprint()}) == 3
    assert _blocks(20).largest_token == 19


@settings(max_examples=50)
@given(st.integers(2, 60), st.integers(1, 7), st.integers(1, 4))
def test_epochs_are_the_fewest_steps_that_bring_every_block_so_often(count: int, batch_size: int, epochs: int) -> None:
    blocks = _blocks(count)
    steps = blocks.steps(epochs, batch_size)
    seen = [int(x) for step in range(steps) for x in blocks.batch(step, batch_size)["input_ids"][:, 0]]
    assert min(seen.count(block) for block in set(seen)) >= epochs and len(set(seen)) == len(blocks)
    assert len(seen) - batch_size < epochs * len(blocks) <= len(seen)
    with pytest.raises(ValueError, match="epochs=0; expected at least 1"):
        blocks.steps(0, batch_size)


@pytest.mark.parametrize(
    ("tokens", "seq_len", "held_out", "says"),
    [
        (3, 2, 0.1, "3 tokens are too few"),
        (100, 1, 0.1, "nothing to predict"),
        (100, 2, 0.0, "out of range"),
        (100, 2, 0.9, "out of range"),
    ],
)
def test_refuses_what_cannot_be_cut(tokens: int, seq_len: int, held_out: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TokenBlocks(range(tokens), seq_len, held_out=held_out)
