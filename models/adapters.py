"""What capture needs to know about models: how to make one traceable, what to feed it, where its blocks are."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..runtime.isa.errors import CaptureError
from ..runtime.isa.threads import patched
from .attention import NAME, hugging_face_attention
from .decompositions import right_decompositions
from .examples import example_inputs
from .functional import functional_attention
from .mask_readers import mask_readers, mask_replacers
from .packing import packing_as_uncaptured, without_cache
from .python_draws import python_draws_refused
from .value_checks import checks_pass

__all__ = ["blocks", "capturable", "example_inputs", "exchanges_modules"]


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _with_parts(part)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every configuration object held by a module of the model, including nested ones, once each."""
    held = (getattr(module, "config", None) for module in model.modules())
    found = {id(part): part for c in held if isinstance(c, PreTrainedConfig) for part in _with_parts(c)}
    return list(found.values())


def _read_by(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that a model and its layers read, without those of nested models. Layers keep the
    configuration they were built with, which may not be the model's: an encoder-decoder gives its parts new ones."""
    found = {id(part): part for part in _with_parts(model.config)}
    waiting: list[nn.Module] = [model]
    while waiting:
        for child in waiting.pop().children():
            if isinstance(child, PreTrainedModel):
                continue
            config = getattr(child, "config", None)
            if isinstance(config, PreTrainedConfig):
                found |= {id(part): part for part in _with_parts(config)}
            waiting.append(child)
    return list(found.values())


@contextmanager
def _restored(configs: list[PreTrainedConfig]) -> Iterator[None]:
    """Undo every change to the configurations' attributes on leaving, including changes made by a forward."""
    before = [dict(vars(config)) for config in configs]
    try:
        yield
    finally:
        for config, attributes in zip(configs, before, strict=True):
            vars(config).clear()
            vars(config).update(attributes)


def _choose_implementations(model: nn.Module, notes: list[str]) -> None:
    """Select our attention where the model takes one by name, and experts as batched matmuls, not a loop over data.

    A configuration that asks for eager attention keeps it: that is how a user opts out.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        kind, readers = type(module), mask_readers(module)
        takes_attention, takes_experts = (
            kind._can_set_attn_implementation(),
            kind._can_set_experts_implementation(),
        )
        for config in _read_by(module):
            without_cache(config)
            if takes_experts:
                config._experts_implementation_internal = "batched_mm"
            if config._attn_implementation == "eager" and takes_attention:
                text = f"{kind.__name__}: attention stays eager, as configured"
                notes.extend([text] if text not in notes else [])
            elif takes_attention and not readers:
                config._attn_implementation_internal = NAME
        if not takes_attention or readers:
            why = f"{readers[0]} reads its mask" if readers else "the model has no attention interface"
            text = f"{kind.__name__}: attention stays as it is, {why}"
            notes.extend([text] if text not in notes else [])


def _refuse_masks_that_depend_on_values(model: nn.Module) -> None:
    """Raises CaptureError if transformers may drop a mask because of its values and a module's result then changes."""
    for module in model.modules():
        replacers = mask_replacers(module) if isinstance(module, PreTrainedModel) else []
        if replacers and module.config._attn_implementation != "eager":
            raise CaptureError(
                f"{replacers[0]} attends to all keys, later ones too, when it gets no mask, and with "
                f"attn_implementation={module.config._attn_implementation!r} transformers passes none when "
                "attention_mask masks nothing, so the result depends on the mask's values; load the model with "
                "attn_implementation='eager', or call it without attention_mask"
            )


def _layerdrops(module: nn.Module) -> dict[str, float]:
    """Attributes with a probability of skipping layers: the module's own or, failing that, its configuration's."""
    own = {name: value for name, value in vars(module).items() if "layerdrop" in name}
    config = getattr(module, "config", None)
    if not own and isinstance(config, PreTrainedConfig):
        own = {f"config.{name}": value for name, value in vars(config).items() if "layerdrop" in name}
    return {name: float(value) for name, value in own.items() if isinstance(value, (int, float))}


def _refuse_layerdrop(model: nn.Module) -> None:
    owned = any("layerdrop" in name for module in model.modules() for name in vars(module))
    for path, module in model.named_modules():
        for name, value in _layerdrops(module).items() if module.training else ():
            # If modules have copies of their own, the forward reads those.
            if value and not (owned and name.startswith("config.")):
                raise CaptureError(
                    f"{path or type(module).__name__}.{name} is {value}: layers are skipped at random, so there is no "
                    "single graph to capture; expected 0. Set it to 0, or call model.eval()"
                )


@contextmanager
def _layers_never_dropped() -> Iterator[None]:
    """Makes `torch.rand([])` return 1.0 in modules that compare it with a layerdrop of 0.

    The comparison would otherwise branch on a tensor's value. Only callers that have such an attribute get the
    constant: other code may draw a scalar for reasons of its own.
    """
    original = torch.rand

    def rand(*size: Any, **options: Any) -> Any:
        caller = sys._getframe(2).f_locals.get("self")  # behind what tells threads apart
        scalar = len(size) == 1 and isinstance(size[0], (list, tuple)) and not size[0]
        if scalar and isinstance(caller, nn.Module) and _layerdrops(caller):
            return 1.0
        return original(*size, **options)

    with patched(torch, "rand", rand):
        yield


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Switches off Hugging Face's gradient checkpointing, with a warning: the plan decides what is recomputed."""
    switched = (module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func"))
    asked = [module for module in switched if module.gradient_checkpointing]
    if asked:
        warnings.warn(
            "gradient checkpointing is on, but compiled steps ignore it: compile(recompute=) decides what is "
            "recomputed, by default as much as the budget requires",
            stacklevel=2,
        )
    for module in asked:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in asked:
            module.gradient_checkpointing = True


@contextmanager
def capturable(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[list[str]]:
    """Prepare `model` for tracing with the inputs `kwargs`; undo everything on leaving, even after an exception.

    Hugging Face models get attention by name, experts as batched matmuls, no key-value cache, no gradient
    checkpointing, and no branch on random layer skipping; checks of tensors' values pass; direct calls of torch's
    attention are routed for any module. Parameters are untouched. Torch functions are replaced while it is open, for
    this thread; one thread at a time may open it.

    Yields readable notes on what stays eager and what is packed; the list is complete on leaving.

    Raises:
        CaptureError: a module in training mode skips layers with non-zero probability; transformers may drop the mask
            because of its values, and the model then computes something else; or, on leaving, a sliding-window mask
            reached no layer.
    """
    _refuse_layerdrop(model)
    if kwargs.get("attention_mask") is not None:
        _refuse_masks_that_depend_on_values(model)
    with ExitStack() as stack:
        stack.enter_context(packing_as_uncaptured(model))
        stack.enter_context(_restored(_configs(model)))
        stack.enter_context(_layers_never_dropped())
        stack.enter_context(_without_checkpointing(model))
        stack.enter_context(checks_pass())
        notes = stack.enter_context(hugging_face_attention())
        stack.enter_context(functional_attention(notes))
        stack.enter_context(right_decompositions())
        stack.enter_context(python_draws_refused())
        _choose_implementations(model, notes)
        yield notes


def _owns_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Fully qualified names of the repeated blocks, in module order.

    Blocks are the children with parameters of each outermost nn.ModuleList or nn.Sequential that has at least two such
    children; lists inside a block are part of it. A module in two lists is named once.
    """
    names: dict[int, str] = {}

    def visit(module: nn.Module, path: str) -> None:
        children = [(f"{path}{name}", child) for name, child in module.named_children()]
        own = [(name, child) for name, child in children if _owns_parameters(child)]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(own) > 1:
            for name, child in own:
                names.setdefault(id(child), name)
            return
        for name, child in children:
            visit(child, f"{name}.")

    visit(model, "")
    return tuple(names.values())


def exchanges_modules(module: nn.Module) -> bool:
    """Whether a module's methods may replace modules of the model, as PEFT's do that add, merge and unload adapters."""
    return type(module).__module__.partition(".")[0] == "peft"
