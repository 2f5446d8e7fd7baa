"""Saves that a thread writes while training goes on, from copies made before training continues.

The thread communicates with other processes over a group of its own, so that it does not interfere with the order of
training's collectives. It also makes the copies, while the caller of the save waits: what this process has to write is
known only once the processes have agreed.
"""

import atexit
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from math import prod
from threading import Thread

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from ..distributed.ranks import Ranks
from ..isa.errors import CheckpointError
from ..memory.hardware import Hardware
from ..memory.tiers import Tier
from .filesystem import quiet

Copies = dict[MetadataIndex, Tensor | BytesIO]


class Saving:
    """A checkpoint that a thread writes. `copied` is done once the state may change again."""

    def __init__(self) -> None:
        self.copied: Future[None] = Future()
        self.is_told = False  # whether a caller has seen the failure
        self._written: Future[None] = Future()

    @classmethod
    def finished(cls) -> "Saving":
        """A checkpoint that is already in place."""
        saving = cls()
        saving._written.set_result(None)
        return saving

    def done(self) -> bool:
        """Whether it is in place, or has failed."""
        return self._written.done()

    def result(self) -> None:
        """Blocks until it is in place.

        Raises CheckpointError if it could not be written; what was saved there before is intact.
        """
        try:
            self._written.result()
        finally:
            self.is_told = self.done()

    def failure(self) -> Exception | None:
        """Blocks until it is done. Returns the error it failed with, unless a caller has seen that already."""
        error = _failure(self._written)
        return None if self.is_told else error

    def run(self, write: Callable[[], None], context: AbstractContextManager[object]) -> None:
        """Runs `write` in `context`, on the thread, and sets the futures."""
        error = None
        try:
            with context, torch.no_grad():
                write()
        except Exception as caught:
            error = caught
        for future in (self._written, self.copied):
            if not future.done():
                future.set_exception(error) if error else future.set_result(None)


def _failure(future: "Future[None]") -> Exception | None:
    """Blocks until the future is done and returns its error."""
    error = future.exception()
    assert error is None or isinstance(error, Exception)
    return error


@dataclass(frozen=True)
class Copying:
    """Makes the copies of a save, on the host.

    `tier` must have room for them beside `planned_bytes`, the most that training uses there, whether it is in use now
    or not. Without room the save fails or, if it `may_wait`, is written from the state itself while its caller waits.
    """

    tier: Tier
    saving: Saving
    may_wait: bool
    planned_bytes: int

    def copies(self, items: Sequence[WriteItem], read: Callable[[WriteItem], Tensor | BytesIO]) -> Copies | None:
        """Copies what `read` returns for each item that this process writes; None if items must be read when they are
        written.

        Raises CheckpointError if there is no room for the copies.
        """
        needed_bytes, limit_bytes = sum(map(_num_bytes, items)), self.tier.limit_bytes
        taken_bytes = max(self.tier.used_bytes, self.planned_bytes)
        if limit_bytes is not None and taken_bytes + needed_bytes > limit_bytes:
            if self.may_wait:
                return None
            raise CheckpointError(
                f"saving a checkpoint in the background needs a copy of {needed_bytes:,} bytes, but the host budget "
                f"of {limit_bytes:,} leaves only {max(limit_bytes - taken_bytes, 0):,} next to the {taken_bytes:,} "
                "that training uses; raise host_budget by the difference, or save without background=True"
            )
        copies = {item.index: self._copy(read(item)) for item in items}
        self.saving.copied.set_result(None)  # raises if the waiting caller was interrupted: the state may have changed
        return copies

    def _copy(self, value: Tensor | BytesIO) -> Tensor | BytesIO:
        if isinstance(value, BytesIO):
            return value
        copy = torch.empty(value.shape, dtype=value.dtype).copy_(value)
        self.tier.watch(copy.untyped_storage(), "a copy that is written in the background")
        return copy


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else prod(data.chunk.sizes) * data.properties.dtype.itemsize


class Background:
    """One model's saves in the background, one at a time."""

    def __init__(self, ranks: Ranks, hardware: Hardware) -> None:
        self._training, self._hardware = ranks, hardware
        self._last: Saving | None = None

    @cached_property
    def ranks(self) -> Ranks:
        """A process group for the saving threads, which the exit of this process waits for. All processes must ask for
        it the first time together."""
        atexit.register(self._end)
        return self._training.apart()

    def start(self, write: Callable[[Copying], None], planned_bytes: int, *, may_wait: bool = False) -> Saving:
        """Runs `write` on a thread and returns once the state may change. `planned_bytes` is the most host memory that
        training uses. All processes call it.

        Raises on all of them what fails on any one before that.
        """
        saving = self._last = Saving()
        copying = Copying(self._hardware.host_tier, saving, may_wait, planned_bytes)
        with quiet():  # not in the thread: warning filters are global to the process
            Thread(target=saving.run, args=(lambda: write(copying), self._context())).start()
            try:
                self._training.raise_alike(_failure(saving.copied))
            except BaseException:
                saving.copied.cancel()
                saving.is_told = True
                raise
        return saving

    def finish(self) -> None:
        """Blocks until the save under way is done, if there is one. All processes call it.

        Raises the save's CheckpointError if no caller has seen it, and StateError on the other processes.
        """
        if self._last is not None:
            failure = self._last.failure()
            self._last = None
            self._training.raise_alike(failure)

    def _context(self) -> AbstractContextManager[object]:
        """The context in which a thread reads the state: on CUDA, the current stream, behind what was launched."""
        if not self._hardware.is_cuda:
            return nullcontext()
        return torch.cuda.stream(torch.cuda.current_stream(self._hardware.device))

    def _end(self) -> None:
        """At exit, waits for the save under way. Raises its error, so that Python prints it."""
        failure = None if self._last is None else self._last.failure()
        if failure is not None:
            raise failure
