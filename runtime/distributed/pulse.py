"""Tells which processes are alive: each adds a heartbeat once a second, in the store that torch.distributed met at.

A process that loses another one in an exchange need not be a neighbour of the one that died: in a ring or a pipeline,
processes end one after the other, each because its neighbour did. So every process that ends because of others
announces it, and the first to die is the one that is silent without an announcement.
"""

import atexit
import time
from contextlib import suppress
from functools import cache
from threading import Event, Thread
from typing import Any

from torch import distributed as dist

from ..isa.torch_private import default_store

BEAT_S = 1.0
PATIENCE_S = 5.0
"""How long a living process may be silent."""


class Pulse:
    """The heartbeat of process `rank` of `size`, and the check for others' heartbeats."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        # Two connections to the store, so that one can wait while the other writes.
        self._beating, self._asking = (dist.PrefixStore("geminifx pulse", store.clone()) for _ in range(2))
        self._rank, self._others = rank, [other for other in range(size) if other != rank]
        self._ended = Event()
        self._beating.add(f"beats of {rank}", 1)
        self._thread = Thread(target=self._beat, name="geminifx pulse", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store ended with the process that held it
            while not self._ended.wait(BEAT_S):
                self._beating.add(f"beats of {self._rank}", 1)

    def _end(self) -> None:
        """Stops the heartbeat at exit, before the store that it writes to is torn down."""
        self._ended.set()
        self._thread.join(PATIENCE_S)

    def ended(self) -> list[int]:
        """The ranks that ended without an announcement or, if there are none, all that ended. Takes a few seconds.

        Also announces that this process ends because of others.
        """
        try:
            before = self._all("beats")
            time.sleep(PATIENCE_S)
            after, announced = self._all("beats"), self._all("end")
            self._asking.add(f"end of {self._rank}", 1)
        except RuntimeError:
            return []
        silent = [other for other in self._others if before[other] == after[other]]
        return [other for other in silent if not announced[other]] or silent

    def _all(self, what: str) -> dict[int, int]:
        return {other: self._asking.add(f"{what} of {other}", 0) for other in self._others}


def of_process() -> Pulse:
    """The pulse of this process, shared by all models that it trains with the same processes."""
    return _met_at(default_store())


@cache
def _met_at(store: Any) -> Pulse:
    return Pulse(store, dist.get_rank(), dist.get_world_size())
