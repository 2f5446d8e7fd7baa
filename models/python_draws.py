"""Refuses random numbers that a capture would freeze: Python's, NumPy's, and torch's from a seed set in the forward.

A program draws with torch's operators, from the generator as it is when it runs. What other generators give while the
model's Python runs would be the same in every step.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from ..runtime.isa.errors import CaptureError
from ..runtime.isa.threads import patched


@contextmanager
def python_draws_refused() -> Iterator[None]:
    """Within, this thread's calls of the modules' drawing functions raise CaptureError. Code that imported such a
    function by name beforehand, or has a generator of its own, is not seen."""
    with ExitStack() as stack:
        for module, told in ((random, "random"), (np.random, "numpy.random")):
            for name in _drawing(module):
                stack.enter_context(patched(module, name, _refusing(f"{told}.{name}()")))
        for module in (torch, torch.random):
            for name in ("manual_seed", "seed"):
                stack.enter_context(patched(module, name, _refusing(f"torch.{name}()")))
        yield


def _drawing(module: Any) -> list[str]:
    """The module's functions that are methods of its own generator, but for those that read or set its state."""
    owner, names = module.random.__self__, (name for name in dir(module) if name[0] != "_" and "state" not in name)
    return [name for name in names if getattr(getattr(module, name), "__self__", None) is owner]


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise CaptureError(
            f"the forward calls {name}, and its Python runs while it is captured only: what comes of it would be the "
            "same in every step. Draw with torch (torch.rand, torch.bernoulli), or outside of the model, and pass the "
            "numbers as arguments; a Hugging Face configuration may switch such draws off (apply_spec_augment=False)"
        )

    return refuse
