"""Refuses what torch would compute over this process's parameters alone when other processes hold more of them."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Protocol
from weakref import WeakSet

from torch import nn

from ..isa.errors import StateError
from ..isa.torch_private import watch_clipping
from .lazy_parameter import LazyParameter


class Holder(Protocol):
    """An object that holds parameters as plain tensors of this process's parts."""

    def sharded(self) -> Iterator[tuple[nn.Parameter, str]]:
        """The parameters of which other processes hold other parts, and what to tell the user of each."""


_HOLDERS: WeakSet[Holder] = WeakSet()


def refuse_them(holder: Holder) -> None:
    """Makes torch's gradient clipping and GradScaler raise for sharded parameters, lazy ones and those of `holder`."""
    _watch()
    _HOLDERS.add(holder)


@cache
def _watch() -> None:
    watch_clipping(_check)


def _check(parameters: Sequence[Any]) -> None:
    """Raises StateError if other ranks hold some of the parameters, or parts of them."""
    sharded = {id(parameter): told for holder in _HOLDERS for parameter, told in holder.sharded()}
    for parameter in parameters:
        told = parameter.source.elsewhere if isinstance(parameter, LazyParameter) else sharded.get(id(parameter))
        if told:
            raise StateError(
                f"torch clips gradients, or scales them, by what this process has of them, and {told}. Every rank "
                "would find something else: clip with model.clip_grad_norm_(...), or max_grad_norm= of "
                "model.optimizer(...), whose float16 has a loss scale"
            )
