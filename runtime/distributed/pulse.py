"""Who of the processes is alive: each says so once a second, in the store at which all of them have met.

Whoever loses another one in an exchange need not have been next to the one that died: of a ring, or of a pipeline,
processes end one after the other, each because its neighbour did. So the first of them is the one whose end nobody has
announced, and the others announce theirs.
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
"""How long a process that is alive may be silent."""


class Pulse:
    """This process's, number `rank` of `size`, and what it knows of the others'."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        # A store of its own each, with which one may wait while the others write.
        self._beating, self._asking = (dist.PrefixStore("geminifx pulse", store.clone()) for _ in range(2))
        self._rank, self._others = rank, [other for other in range(size) if other != rank]
        self._ended = Event()
        self._beating.add(f"beats of {rank}", 1)
        self._thread = Thread(target=self._beat, name="geminifx pulse", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store has ended with the process that held it
            while not self._ended.wait(BEAT_S):
                self._beating.add(f"beats of {self._rank}", 1)

    def _end(self) -> None:
        """The process ends: nothing may be written through what is taken apart then."""
        self._ended.set()
        self._thread.join(PATIENCE_S)

    def ended(self) -> list[int]:
        """Who has ended without a word; where nobody has, all that have ended. It takes a few seconds.

        From here on it is known of this process that it ends for others' sake.
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
    """The one of this process, whatever models it trains with those that it met."""
    return _met_at(default_store())


@cache
def _met_at(store: Any) -> Pulse:
    return Pulse(store, dist.get_rank(), dist.get_world_size())
