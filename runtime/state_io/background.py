"""Saves that a thread writes while training goes on: of copies, which are made before it does.

What the thread exchanges with other processes goes over a group of its own, so that it falls between nobody's
collectives. It makes the copies, too, while whoever asked for the save waits: what of the state is this process's to
write is known only then.
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
    """A checkpoint that a thread writes. `copied` is done when the state may change again."""

    def __init__(self) -> None:
        self.copied: Future[None] = Future()
        self.is_told = False  # of a failure
        self._written: Future[None] = Future()

    @classmethod
    def finished(cls) -> "Saving":
        """Of a checkpoint that is at its place."""
        saving = cls()
        saving._written.set_result(None)
        return saving

    def done(self) -> bool:
        """Whether it is at its place, or failed."""
        return self._written.done()

    def result(self) -> None:
        """Block until it is at its place.

        Raises CheckpointError where it could not be written; what was saved there before is intact.
        """
        try:
            self._written.result()
        finally:
            self.is_told = self.done()

    def failure(self) -> Exception | None:
        """Block until it is done. What it failed with, unless somebody was told."""
        error = _failure(self._written)
        return None if self.is_told else error

    def run(self, write: Callable[[], None], context: AbstractContextManager[object]) -> None:
        """What the thread does."""
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
    """Block until it is done, and tell how it went."""
    error = future.exception()
    assert error is None or isinstance(error, Exception)
    return error


@dataclass(frozen=True)
class Copying:
    """Makes the copies of a save, on the host, where `tier` has to have room for them beside the `planned_bytes` that
    training takes there at most, whether they are in use or not. Without room the save fails, or, if it `may_wait`, is
    written of the state itself, while whoever asked for it waits."""

    tier: Tier
    saving: Saving
    may_wait: bool
    planned_bytes: int

    def copies(self, items: Sequence[WriteItem], read: Callable[[WriteItem], Tensor | BytesIO]) -> Copies | None:
        """What `read` tells of all that this process writes; None where it is to be read when it is written.

        Raises CheckpointError where there is no room for that.
        """
        needed_bytes, limit_bytes = sum(map(_num_bytes, items)), self.tier.limit_bytes
        taken_bytes = max(self.tier.used_bytes, self.planned_bytes)
        if limit_bytes is not None and taken_bytes + needed_bytes > limit_bytes:
            if self.may_wait:
                return None
            raise CheckpointError(
                f"the copy that a checkpoint in the background is written from takes {needed_bytes:,} bytes, of which "
                f"the host budget of {limit_bytes:,} has room for {max(limit_bytes - taken_bytes, 0):,} beside the "
                f"{taken_bytes:,} of training; raise host_budget by as much as is missing, or save without "
                "background=True"
            )
        copies = {item.index: self._copy(read(item)) for item in items}
        self.saving.copied.set_result(None)  # raises where whoever waits was interrupted: the state may change
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
    """The saves of one model in the background, one at a time."""

    def __init__(self, ranks: Ranks, hardware: Hardware) -> None:
        self._training, self._hardware = ranks, hardware
        self._last: Saving | None = None

    @cached_property
    def ranks(self) -> Ranks:
        """The processes, as threads exchange, which the end of this one waits for. All ask for it first together."""
        atexit.register(self._end)
        return self._training.apart()

    def start(self, write: Callable[[Copying], None], planned_bytes: int, *, may_wait: bool = False) -> Saving:
        """Let a thread run `write`, and return when the state may change; training takes `planned_bytes` of the host's
        memory at most. All processes call it.

        Raises on all of them what fails on one before that.
        """
        saving = self._last = Saving()
        copying = Copying(self._hardware.host_tier, saving, may_wait, planned_bytes)
        with quiet():  # not in the thread: filters of warnings are the whole process's
            Thread(target=saving.run, args=(lambda: write(copying), self._context())).start()
            try:
                self._training.raise_alike(_failure(saving.copied))
            except BaseException:
                saving.copied.cancel()
                saving.is_told = True
                raise
        return saving

    def finish(self) -> None:
        """Block until the save under way is done, if there is one. All processes call it.

        Raises CheckpointError where it failed and nobody was told, and on the others StateError.
        """
        if self._last is not None:
            failure = self._last.failure()
            self._last = None
            self._training.raise_alike(failure)

    def _context(self) -> AbstractContextManager[object]:
        """In which a thread reads the state: behind what was launched."""
        if not self._hardware.is_cuda:
            return nullcontext()
        return torch.cuda.stream(torch.cuda.current_stream(self._hardware.device))

    def _end(self) -> None:
        """The process ends: what it saves does, too. Raises where that failed, for Python to show."""
        failure = None if self._last is None else self._last.failure()
        if failure is not None:
            raise failure
