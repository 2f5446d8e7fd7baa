"""Pauses Python's garbage collector of cycles while programs are made.

Programs consist of hundreds of thousands of nodes in cycles, all of them alive. Traversing them over and over in search
of garbage takes as long as all other work.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting_collector() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
