"""Python's collector of cycles rests while programs are made.

Their nodes are made by the hundred thousand, live all of them, and stand in cycles: to look through them again and
again for some that do not live takes as long as all the rest.
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
