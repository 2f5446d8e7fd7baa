"""Attention: problems of any shape and kind are as near to float64 as their dtype allows, gradients too."""

import random
from collections.abc import Iterator

import pytest
import torch
from attention_reference import TOLERANCE, errors, padding, tensors

SIZE = 10_000


def check(number: int) -> None:
    chance = random.Random(number)
    torch.manual_seed(number)
    dtype, kind = chance.choice(list(TOLERANCE)), chance.choice(["none", "left", "right", "whole row"])
    batch, heads, size = chance.randint(2, 4), chance.choice([1, 2, 4, 6]), chance.choice([1, 3, 8, 16, 20])
    shared = chance.choice([n for n in (1, 2, 3, 6) if heads % n == 0])
    queries = chance.choice([1, 2, 5, 16, 33, 70])
    keys = queries if chance.random() < 0.5 else chance.choice([1, 4, 7, 31, 64])
    causal = chance.random() < 0.5
    window = chance.choice([0, 0, 1, 3, 50]) if causal else 0
    problem = {"scale": chance.choice([0.1, 0.25, 1.3]), "causal": causal, "window": window}
    mine = tensors((batch, heads, queries, size), (batch, heads // shared, keys, size), dtype)
    for name, error in errors(mine, padding(kind, batch, keys), problem).items():
        told = f"case {number}: {name} of {mine[0].shape}, {mine[1].shape}, {dtype}, {kind}, {problem}"
        assert error < TOLERANCE[dtype], f"{told}: {error}"


@pytest.mark.campaign
def test_attention_of_any_shape_is_that_of_float64(cases: Iterator[int]) -> None:
    for number in cases:
        check(number)
