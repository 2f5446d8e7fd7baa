"""One capture for all tests that compile the same model alike: it takes longest of all, and does not see weights."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import Any
from unittest import mock

import torch
from geminifx.compiler import captures
from geminifx.compiler.capture.arguments import leaf_key
from geminifx.compiler.capture.guards import PLAIN, Guard
from geminifx.compiler.capture.trace import Captured, CaptureRequest
from torch import nn
from torch.utils import _pytree as pytree

_CAPTURED: dict[Hashable, tuple[Captured, tuple[tuple[str, str], ...]]] = {}
"""Without guards, which hold the model that was captured: instead of these the owner's and the attribute's names."""


@contextmanager
def shared_captures(of: Hashable) -> Iterator[None]:
    """Within, models that are built alike for the same `of` are captured once for each kind of call, whatever their
    weights. Numbers and switches of their modules and configurations may be changed."""
    capture = captures.capture

    def once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], request: CaptureRequest) -> Captured:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = of, torch.cuda.is_available(), repr(request), _state(model), spec, *map(leaf_key, leaves)
        if key not in _CAPTURED:
            found = capture(model, args, kwargs, request)
            if found.program.constants:  # tensors of this model
                return found
            guarded = tuple((g.label.removesuffix(g.name).rstrip("."), g.name) for g in found.guards)
            _CAPTURED[key] = replace(found, guards=()), guarded
        found, guarded = _CAPTURED[key]
        guards = (Guard.of(attrgetter(path)(model) if path else model, name, path) for path, name in guarded)
        return replace(found, guards=tuple(guards))

    with mock.patch.object(captures, "capture", once):
        yield


def _state(model: nn.Module) -> Hashable:
    """What may differ between models that are built alike."""
    values = ((path, *item) for path, module in model.named_modules() for item in vars(module).items())
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    plain = tuple((path, name, repr(value)) for path, name, value in values if isinstance(value, PLAIN))
    return trained, plain, repr(getattr(model, "config", None))
