"""Refuses what torch would compute over this process's parts of parameters, where other processes have the rest."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol
from weakref import WeakSet

from torch import nn
from torch.optim import LBFGS, Adafactor, Muon, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..isa.errors import StateError
from ..isa.torch_private import watch_clipping
from .lazy_parameter import LazyParameter


class Holder(Protocol):
    """An object that holds local shards of parameters as plain tensors."""

    def sharded(self) -> Iterator[tuple[nn.Parameter, str]]:
        """Yields each parameter of which other processes hold other shards, and a sentence that says so."""


_HOLDERS: WeakSet[Holder] = WeakSet()


def refuse_them(holder: Holder) -> None:
    """Makes torch's clipping, GradScaler and whole-parameter optimizers raise for sharded parameters, lazy ones and
    those of `holder`, from here on in this process."""
    _watch()
    _HOLDERS.add(holder)


@cache
def _watch() -> None:
    watch_clipping(_check_norm)
    register_optimizer_step_pre_hook(_check_step)


def _check_norm(parameters: Sequence[Any]) -> None:
    """Raises StateError where other ranks have some of the parameters, or parts of them."""
    for told in _elsewhere(parameters):
        raise StateError(
            f"torch clips or scales gradients by the part that this process holds, but {told}, so every rank would "
            "use a different norm. Clip with model.clip_grad_norm_(...) or with max_grad_norm= of "
            "model.optimizer(...), which has a loss scale of its own for float16"
        )


def _check_step(optimizer: Optimizer, *_: Any) -> None:
    """Raises StateError where an optimizer of torch's is not element-wise, and would take a shard for the whole."""
    if not isinstance(optimizer, LBFGS | Adafactor | Muon):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(optimizer, LBFGS):  # it computes over each parameter alone
        parameters = [parameter for parameter in parameters if not isinstance(parameter, LazyParameter)]
    for told in _elsewhere(parameters):
        raise StateError(
            f"torch.optim.{type(optimizer).__name__} is not element-wise: it computes over entire parameters, but "
            f"{told}, so every rank would compute a different update. Use an element-wise optimizer, such as AdamW"
        )


def _elsewhere(parameters: Iterable[Any]) -> Iterator[str]:
    """What other ranks have of the parameters, a sentence for each that this process lacks in whole or in part."""
    sharded = {id(parameter): told for holder in _HOLDERS for parameter, told in holder.sharded()}
    for parameter in parameters:
        told = parameter.source.elsewhere if isinstance(parameter, LazyParameter) else sharded.get(id(parameter))
        if told:
            yield told
