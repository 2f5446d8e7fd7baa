"""Models that cannot be captured, told before anything is done to them, with the way that works instead."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedTensorMixin


def refuse(model: nn.Module) -> None:
    """Raises ValueError for a model that cannot be captured as it is."""
    for path, module in model.named_modules():
        for reason in _reasons(module):
            name = f"{type(module).__name__} {path}".rstrip()
            raise ValueError(f"{name} {reason}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedTensorMixin):
            raise ValueError(f"parameter {name} has no shape yet; call the lazy module once before it is compiled")
        if parameter.is_complex() and parameter.requires_grad:
            raise ValueError(
                f"parameter {name} is complex, and training state is of real numbers; keep its real and imaginary "
                "parts as two parameters and join them by torch.complex() where they are used"
            )


def _reasons(module: nn.Module) -> Iterator[str]:
    if hasattr(module, "_orig_mod"):
        yield "was made by torch.compile; compile the module that it was made from, ._orig_mod"
    if isinstance(module, torch.jit.ScriptModule):
        yield "is scripted, and cannot be traced further; compile the module that it was made from"
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        yield 'divides the batch itself; compile its .module, with parallel={"data": N} for N processes'
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.sparse:
            yield "makes sparse gradients, for which there is no place in chunks; expected sparse=False"
        if module.max_norm is not None:
            yield (
                "writes to its weight in the forward, for max_norm=; leave that out, and rescale rows behind "
                "optimizer.step() where they need it"
            )
    derived = [name for name, value in vars(module).items() if isinstance(value, Tensor) and not value.is_leaf]
    if derived:
        yield (
            f"has {derived[0]} computed by a hook from parameters of its own, as the old weight_norm, spectral_norm "
            "and prune do; use torch.nn.utils.parametrizations, or make pruning permanent by prune.remove()"
        )
