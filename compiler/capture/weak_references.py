"""Modules that refer weakly to their parameters, as torch's recurrent ones do: such objects cannot become others."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_weak_references(source: nn.Module) -> Iterator[None]:
    """While parameters become others under the same objects."""
    modules = [module for module in source.modules() if isinstance(module, nn.RNNBase)]
    for module in modules:
        module._flat_weight_refs = []
    if modules:
        gc.collect()  # of copies that were traced: they share these references
    try:
        yield
    finally:
        for module in modules:
            module._flat_weight_refs = [weakref.ref(w) if w is not None else None for w in module._flat_weights]
