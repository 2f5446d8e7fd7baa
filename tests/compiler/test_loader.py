"""shard_dataloader: the ranks' parts are equally long and cover the data; what is not ours to divide is refused."""

from collections.abc import Iterator
from dataclasses import replace

import geminifx
import pytest
import torch
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.mesh import Axis, Mesh
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)


def as_rank(rank: int, size: int) -> geminifx.CompiledModule:
    model = geminifx.compile(nn.Linear(2, 2), world_size=size)
    model.session.ranks = replace(model.session.ranks, rank=rank)
    return model


@given(st.integers(1, 40), st.integers(2, 5), st.integers(1, 4), st.booleans())
def test_parts_cover_the_data_and_are_equally_long(length: int, size: int, batch: int, shuffles: bool) -> None:
    data = TensorDataset(torch.arange(length))
    loader = DataLoader(data, batch_size=batch, shuffle=shuffles)
    parts = [list(geminifx.shard_dataloader(loader, as_rank(rank, size))) for rank in range(size)]
    lengths = [[len(rows) for (rows,) in part] for part in parts]
    assert all(found == lengths[0] for found in lengths), "every rank takes the same steps"
    assert {int(i) for part in parts for (rows,) in part for i in rows} == set(range(length))


def test_alone_the_loader_is_returned_itself() -> None:
    loader = DataLoader(TensorDataset(torch.arange(4)))
    assert geminifx.shard_dataloader(loader, geminifx.compile(nn.Linear(2, 2))) is loader


PIPELINE = Mesh((Axis("pipeline", 2, "pipeline"), Axis("data", 2, "data")))
TENSORS = Mesh((Axis("tp", 3, "tensor"),))


@pytest.mark.parametrize("mesh", [PIPELINE, TENSORS], ids=str)
@pytest.mark.parametrize("shuffles", [False, True])
def test_ranks_that_share_a_batch_are_given_the_same(mesh: Mesh, shuffles: bool) -> None:
    data, model = TensorDataset(torch.arange(24)), geminifx.compile(nn.Linear(2, 2))
    parts: dict[int, list[list[int]]] = {}
    for rank in range(mesh.size):
        torch.manual_seed(rank)  # each process draws numbers of its own
        model.session.ranks = Ranks(mesh, rank)
        sharded = geminifx.shard_dataloader(DataLoader(data, batch_size=4, shuffle=shuffles), model)
        epochs = []
        for epoch in range(2):
            if shuffles:
                sharded.sampler.set_epoch(epoch)
            epochs.append([int(i) for (rows,) in sharded for i in rows])
        assert (epochs[0] != epochs[1]) == shuffles
        assert parts.setdefault(mesh.data_rank(rank), epochs) == epochs
    assert sorted(i for epochs in parts.values() for i in epochs[0]) == list(range(24))


def test_where_all_are_given_the_same_a_sampler_may_decide_itself() -> None:
    data, model = TensorDataset(torch.arange(4)), geminifx.compile(nn.Linear(2, 2))
    model.session.ranks = Ranks(TENSORS, 1)
    for loader in (DataLoader(data), DataLoader(Stream()), DataLoader(data, sampler=WeightedRandomSampler([1.0], 4))):
        assert geminifx.shard_dataloader(loader, model) is loader


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(4)


def test_what_decides_itself_is_refused() -> None:
    data = TensorDataset(torch.arange(4))
    loaders = (
        DataLoader(Stream()),
        DataLoader(data, sampler=WeightedRandomSampler([1.0] * 4, 4)),
        DataLoader(data, sampler=RandomSampler(data, replacement=True)),
        DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, drop_last=False)),
    )
    for loader in loaders:
        with pytest.raises(ValueError, match="own part \\(part 1 of 2 here\\)"):
            geminifx.shard_dataloader(loader, as_rank(1, 2))


@given(st.integers(0, 20), st.integers(2, 5))
def test_of_any_iterable_each_rank_takes_its_batches(count: int, size: int) -> None:
    """Equally many, each of them by somebody, and in their order."""
    parts = [list(geminifx.shard_dataloader(range(count), as_rank(rank, size))) for rank in range(size)]
    assert {len(part) for part in parts} == {-(-count // size)}
    assert all(len(geminifx.shard_dataloader(range(count), as_rank(rank, size))) == len(parts[0]) for rank in (0, 1))
    assert sorted({batch for part in parts for batch in part}) == list(range(count))
    whole = count // size
    assert [batch for step in zip(*parts, strict=True) for batch in step][: whole * size] == list(range(whole * size))


def test_an_iterable_is_gone_through_anew_in_every_epoch() -> None:
    sharded = geminifx.shard_dataloader([0, 1, 2, 3], as_rank(1, 2))
    assert [list(sharded), list(sharded)] == [[1, 3], [1, 3]]


def test_ranks_that_share_a_batch_take_the_same_of_an_iterable() -> None:
    model = geminifx.compile(nn.Linear(2, 2))
    for rank, expected in ((0, [0, 2]), (1, [1, 3]), (2, [0, 2]), (3, [1, 3])):
        model.session.ranks = Ranks(PIPELINE, rank)
        assert list(geminifx.shard_dataloader(range(4), model)) == expected


def test_alone_an_iterable_is_returned_itself() -> None:
    batches = [0]
    assert geminifx.shard_dataloader(batches, geminifx.compile(nn.Linear(2, 2))) is batches


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "given", [(i for i in range(4)), iter([0, 1]), map(abs, [0, 1])], ids=lambda g: type(g).__name__
)
def test_what_ends_with_its_first_epoch_is_refused(given: Iterator[int], size: int) -> None:
    message = f"this {type(given).__name__} is exhausted after one epoch.*expected a list of batches, or an object"
    with pytest.raises(ValueError, match=message):
        geminifx.shard_dataloader(given, as_rank(0, size))


@pytest.mark.parametrize("given", [8, "batches", {"input_ids": [0]}, torch.zeros(4), TensorDataset(torch.zeros(4))])
def test_what_has_no_batches_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"expected a torch.utils.data.DataLoader, or an iterable of batches"):
        geminifx.shard_dataloader(given, as_rank(0, 2))
