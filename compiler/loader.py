"""Shards a data loader, so that each rank loads its own part of the data."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from ..runtime.isa.errors import ArgumentError, wrong_argument
from .arguments import check_compiled
from .module import CompiledModule

EXPECTED = (
    "a torch.utils.data.DataLoader, or an iterable of batches, such as a list or an object with __iter__, that has the "
    "same ones on every rank"
)


def shard_dataloader(loader: Iterable[Any], model: CompiledModule) -> Any:
    """A loader of this rank's part of `loader`'s data, in batches of the same size; on one rank, `loader` itself.

    Ranks that share a batch, as they share tensors or layers, get the same part. All parts are equally long: if the
    data does not divide, some examples come twice. A loader that shuffles reshuffles in each epoch for which
    `sharded.sampler.set_epoch(epoch)` is called, in the same order on all ranks.

    Any other iterable must have the same batches on every rank; each rank takes its share, batch by batch. If one batch
    is shorter, as the last often is, torch's cross entropy still averages over the targets of all ranks. With any other
    loss every batch's mean counts the same, so the examples of the shorter one weigh more.

    Raises ArgumentError for what has no batches or is no compiled model; for generators and other iterators, which end
    with their first epoch; and for a DataLoader with an iterable dataset or a custom sampler, which must do its own
    sharding.
    """
    check_compiled(model)
    if isinstance(loader, DataLoader):
        return _of_examples(loader, model)
    if not isinstance(loader, Iterable) or isinstance(loader, str | bytes | Mapping | Tensor | Dataset):
        raise wrong_argument("loader", loader, EXPECTED)
    if isinstance(loader, Iterator):
        raise ArgumentError(
            f"loader: this {type(loader).__name__} is exhausted after one epoch and would yield no batches in the "
            "next; expected a list of batches, or an object whose __iter__ starts again"
        )
    mesh = model.session.ranks.mesh
    return loader if mesh.data_size == 1 else Batches(loader, model.session.ranks.data_rank, mesh.data_size)


@dataclass(frozen=True)
class Batches:
    """Every `parts`-th batch of `whole`, starting with number `part`; can be iterated anew for each epoch. If the
    batches do not divide evenly, parts that are one short repeat their first batch, or the very first if they have
    none."""

    whole: Iterable[Any]
    part: int
    parts: int

    def __iter__(self) -> Iterator[Any]:
        spare, count = None, 0
        for count, batch in enumerate(self.whole, 1):
            if count == 1 or count == self.part + 1:
                spare = batch
            if (count - 1) % self.parts == self.part:
                yield batch
        if self.part >= count % self.parts > 0:
            yield spare

    def __len__(self) -> int:
        """Raises TypeError if `whole` has no length."""
        return -(-len(self.whole) // self.parts)  # type: ignore[arg-type]  # len() raises the TypeError


def _of_examples(loader: DataLoader[Any], model: CompiledModule) -> DataLoader[Any]:
    ranks, own = model.session.ranks, _decides_itself(loader)
    shuffles = isinstance(loader.sampler, RandomSampler)
    if ranks.mesh.data_size == 1 and (own is not None or not (shuffles and ranks.mesh.shares_batches)):
        return loader
    if own is not None:
        raise ArgumentError(
            f"the loader's {type(own).__name__} decides by itself which examples come next, so they cannot be divided "
            f"here; make it yield each rank's own part (part {ranks.data_rank} of {ranks.mesh.data_size} here), and "
            "do not call shard_dataloader"
        )
    part: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, ranks.mesh.data_size, ranks.data_rank, shuffle=shuffles, drop_last=loader.drop_last
    )
    return DataLoader(
        loader.dataset, loader.batch_size, sampler=part, num_workers=loader.num_workers, drop_last=loader.drop_last,
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers, timeout=loader.timeout, generator=loader.generator,
        prefetch_factor=loader.prefetch_factor, multiprocessing_context=loader.multiprocessing_context,
    )  # fmt: skip


def _decides_itself(loader: DataLoader[Any]) -> object | None:
    """The dataset or sampler that picks the examples, if it does more than go through the data once; otherwise None."""
    sampler = loader.sampler
    if isinstance(loader.dataset, IterableDataset):
        return loader.dataset
    if loader.batch_size is None:
        return loader.batch_sampler or sampler
    if isinstance(sampler, RandomSampler):
        return sampler if sampler.replacement or sampler.num_samples != len(loader.dataset) else None
    return None if isinstance(sampler, SequentialSampler) else sampler
