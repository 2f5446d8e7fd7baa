"""Refuses models that cannot be captured before anything is done to them, naming an alternative that works."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ...passes.program.program import Program, note
from ...runtime.isa.errors import CaptureError

SLOW_S = 30.0
"""Captures that take longer than this are reported."""

_OLD_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def refuse(model: nn.Module) -> None:
    """Raises ValueError for a model that cannot be captured as it is."""
    for path, module in model.named_modules():
        for reason in _reasons(module):
            name = f"{type(module).__name__} {path}".rstrip()
            raise ValueError(f"{name} {reason}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name} has no shape yet; call the lazy module once before it is compiled")
        if parameter.is_complex() and parameter.requires_grad:
            raise ValueError(
                f"parameter {name} is complex, but training state consists of real numbers; keep its real and "
                "imaginary parts as two parameters and join them by torch.complex() where they are used"
            )


def hooks_of(modules: Iterable[nn.Module]) -> tuple[tuple[int, ...], ...]:
    """The positions of the modules that have hooks, each with the ids of its hooks."""
    return tuple(
        (place, *m._forward_pre_hooks, *m._forward_hooks, *m._backward_pre_hooks, *m._backward_hooks)
        for place, m in enumerate(modules)
        if m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks
    )


def tell_of_hooks(model: nn.Module) -> None:
    """Warns of forward hooks, which run while the model is captured and not in steps.

    Raises CaptureError for backward hooks, which would not run at all.
    """
    for path, module in model.named_modules():
        name = f"{type(module).__name__} {path}".rstrip()
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"{name} has a backward hook, which a compiled step would not call; remove it, and work on .grad "
                "between backward() and optimizer.step(), or register a hook on a tensor of the loss"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            warnings.warn(
                f"{name} has a forward hook: its tensor operations become part of the program, but its Python code "
                "runs only while the model is captured, not in every step",
                stacklevel=2,
            )


def _reasons(module: nn.Module) -> Iterator[str]:
    if isinstance(module, torch.jit.ScriptModule):
        yield "is scripted and cannot be traced further; compile the original module instead"
        return
    if hasattr(module, "_orig_mod"):
        yield "was made by torch.compile; compile the original module instead, ._orig_mod"
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        yield 'divides the batch by itself; compile its .module instead, with parallel={"data": N} for N processes'
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.sparse:
            yield "produces sparse gradients, which chunks cannot store; expected sparse=False"
        if module.max_norm is not None:
            yield (
                "writes to its weight in the forward, for max_norm=; leave max_norm out, and rescale the rows after "
                "optimizer.step() instead"
            )
    if any(isinstance(hook, _OLD_HOOKS) for hook in module._forward_pre_hooks.values()):
        yield (
            "has a weight that a hook computes from other parameters, as the old weight_norm, spectral_norm and prune "
            "do; use torch.nn.utils.parametrizations, or make pruning permanent by prune.remove()"
        )


def tell_of_slowness(captured_in_s: float, program: Program) -> None:
    """Warns of a capture that took this thread `captured_in_s` seconds of CPU time, and says where its operators come
    from: Python loops are unrolled."""
    if captured_in_s < SLOW_S:
        return
    counts = Counter(note(node).module for node in program.computes)
    (module, most), count = counts.most_common(1)[0], counts.total()
    where = f"{module} ({program.sources[module]})" if program.sources.get(module) else module or "the model itself"
    warnings.warn(
        f"capturing the model took {captured_in_s:.0f} s of CPU time: its Python ran {count:,} operators, {most:,} of "
        f"them in {where}. Loops are unrolled: fewer iterations, or one operator in place of the loop, are captured "
        "faster",
        stacklevel=2,
    )
