"""Data for several ranks: each loads its own part."""

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from ..runtime.isa.errors import ArgumentError, wrong_argument
from .arguments import check_compiled
from .module import CompiledModule


def shard_dataloader(loader: DataLoader[Any], model: CompiledModule) -> DataLoader[Any]:
    """A loader of this rank's part of `loader`'s data, in batches of the same size; alone, `loader` itself.

    Ranks that share a batch, each with a part of the tensors or of the layers, have the same part. The parts are
    equally long: where the data does not divide, some examples come twice. A loader that shuffles is shuffled anew in
    each epoch for which `sharded.sampler.set_epoch(epoch)` is called, and alike on all ranks.

    Raises ArgumentError for what is no loader or no compiled model, and for iterable datasets and samplers of the
    user's own, whose parts are theirs to make.
    """
    if not isinstance(loader, DataLoader):
        raise wrong_argument("loader", loader, "a torch.utils.data.DataLoader")
    check_compiled(model)
    ranks, own = model.session.ranks, _decides_itself(loader)
    shuffles = isinstance(loader.sampler, RandomSampler)
    if ranks.mesh.data_size == 1 and (own is not None or not (shuffles and ranks.mesh.shares_batches)):
        return loader
    if own is not None:
        raise ArgumentError(
            f"the loader's {type(own).__name__} decides itself what comes next; let it give each rank its own part "
            f"(part {ranks.data_rank} of {ranks.mesh.data_size} here), and do not shard the loader"
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
    """What chooses the examples where that is more than going through the data once, in order or shuffled."""
    sampler = loader.sampler
    if isinstance(loader.dataset, IterableDataset):
        return loader.dataset
    if loader.batch_size is None:
        return loader.batch_sampler or sampler
    if isinstance(sampler, RandomSampler):
        return sampler if sampler.replacement or sampler.num_samples != len(loader.dataset) else None
    return None if isinstance(sampler, SequentialSampler) else sampler
