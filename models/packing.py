"""Packed sequences: rows that hold several sequences, each of which begins where positions do.

transformers looks for them where a model gets positions, but neither a mask nor a key-value cache. No program makes a
cache, and while it traces, transformers takes even those positions for packed that a model has made itself. So it is
decided here, for each model in a capture, whether it would look for them outside of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

from ..runtime.isa.threads import patched
from .attention import note
from .own_forward import having_forward


class _WouldCache(int):
    """Stands for `use_cache=True` in a configuration. It counts as False, and models hand it on to their parts."""


WOULD_CACHE = _WouldCache(0)

_WHY_NOT: ContextVar[str | None] = ContextVar("geminifx_why_not_packed", default=None)
"""Why the model that computes does not look for packed sequences, "" if its positions are its own; None if it does."""

CACHED = "position_ids pack no sequences, as the model is not called with use_cache=False"


def without_cache(config: PreTrainedConfig) -> None:
    """Makes models of this configuration make no key-value cache."""
    if getattr(config, "use_cache", False):
        vars(config)["use_cache"] = WOULD_CACHE  # which its own check of types would refuse


@contextmanager
def packing_as_uncaptured(model: nn.Module) -> Iterator[None]:
    """Within, each model looks for packed sequences where it would outside of a capture. Enter it before anything else
    changes the model."""
    finds = masking_utils.find_packed_sequence_indices

    def find(position_ids: Tensor) -> Tensor | None:
        why_not = _WHY_NOT.get()
        if why_not is None:
            return finds(position_ids)
        if why_not:
            note(why_not)
        return None

    with ExitStack() as stack:
        stack.enter_context(patched(masking_utils, "find_packed_sequence_indices", find))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                stack.enter_context(having_forward(module, _deciding(module)))
        yield


def _by_name(signature: inspect.Signature, *args: Any) -> dict[str, Any]:
    """Arguments by name; none if there are too many, which the call itself tells."""
    try:
        return signature.bind_partial(*args).arguments
    except TypeError:
        return {}


def _deciding(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward, within which it is known whether it looks for packed sequences."""
    forward, signature = model.forward, inspect.signature(type(model).forward)
    caches = bool(getattr(model.config, "use_cache", False))
    recomputes = model.training and bool(getattr(model, "gradient_checkpointing", False))  # which takes no cache

    @wraps(forward)
    def deciding(*args: Any, **kwargs: Any) -> Any:
        given = {**_by_name(signature, model, *args), **kwargs}
        asked = given.get("use_cache")
        makes_cache = not recomputes and (caches if asked is None else asked is WOULD_CACHE or asked)
        are_own = given.get("position_ids") is None or _WHY_NOT.get() == ""  # made here, or by a model around this one
        token = _WHY_NOT.set("" if are_own else CACHED if makes_cache else None)
        try:
            return forward(*args, **kwargs)
        finally:
            _WHY_NOT.reset(token)

    return deciding
