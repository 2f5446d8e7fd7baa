"""Modules that hold weak references to their parameters, as torch's RNNs do: swap_tensors refuses such tensors."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_weak_references(source: nn.Module) -> Iterator[None]:
    """Drops the weak references while parameters are swapped in place, and renews them on leaving."""
    modules = [module for module in source.modules() if isinstance(module, nn.RNNBase)]
    for module in modules:
        module._flat_weight_refs = []
    if modules:
        gc.collect()  # traced copies share these references
    try:
        yield
    finally:
        for module in modules:
            module._flat_weight_refs = [weakref.ref(w) if w is not None else None for w in module._flat_weights]
