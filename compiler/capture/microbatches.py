"""Runs a captured step as microbatches: captures part of the batch, and proves that the parts make the whole."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...passes.canonicalize import canonicalize
from ...passes.program.plan import Plan
from ...passes.program.program import Program
from ...passes.sharding.microbatches import microbatched
from ...runtime.isa.errors import SplitError
from ...runtime.isa.threads import CAPTURING, in_this_thread
from .trace import Captured

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Finish = Callable[[Captured, int], Captured]
"""Turns a captured step of whole tensors that runs as the given number of microbatches into this process's step."""


def as_arguments(examples: Mapping[str, Any] | tuple[Any, ...]) -> Arguments:
    """Example inputs, by keyword or position, as the (args, kwargs) of a call."""
    return ((), dict(examples)) if isinstance(examples, Mapping) else (tuple(examples), {})


def typed(arguments: Arguments) -> Arguments:
    """The arguments with every tensor on `meta`, without values."""
    return pytree.tree_map_only(Tensor, _typed, arguments)


def _typed(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return made.requires_grad_(tensor.requires_grad)


def examples(arguments: Arguments) -> int:
    """How many examples a call brings: the most common first dimension of its tensors; 0 if there is none."""
    tensors = (leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim())
    counts = Counter(tensor.shape[0] for tensor in tensors)
    return counts.most_common(1)[0][0] if counts else 0


@dataclass
class Microbatches:
    """Makes and caches the programs of a captured step by number of microbatches. `recapture` captures the step with
    other arguments, and `finish` makes this process's step of the result."""

    whole: Captured
    arguments: Arguments
    recapture: Callable[[Arguments], Captured]
    finish: Finish
    _made: dict[int, Captured] = field(default_factory=dict)

    def __call__(self, count: int) -> Captured:
        """The step as `count` microbatches. Raises SplitError if the batch cannot be divided so."""
        if count not in self._made:
            self._made[count] = self._make(count)
        return self._made[count]

    def undivided(self) -> Captured:
        """The step of the whole batch, which can be divided later."""
        return replace(self.finish(self.whole, 1), examples=examples(self.arguments), divide=self)

    def resized(self, size: int) -> Captured:
        """The step for a batch of `size` examples, captured anew."""
        before = examples(self.arguments)
        arguments = pytree.tree_map_only(Tensor, lambda tensor: _resized(tensor, before, size), self.arguments)
        return Microbatches(self.recapture(arguments), arguments, self.recapture, self.finish).undivided()

    def keep_only(self, count: int) -> None:
        """Drops the cached steps of all other counts, which were not chosen."""
        self._made = {made: step for made, step in self._made.items() if made == count}

    def _make(self, count: int) -> Captured:
        size = examples(self.arguments)
        if not size:
            raise SplitError("no argument is a tensor with examples along its first dimension")
        if size % count:
            raise SplitError(
                f"{size} examples cannot be divided into {count} equal parts; expected a multiple of {count}"
            )
        part = pytree.tree_map_only(Tensor, lambda tensor: _first(tensor, size, count), self.arguments)
        # The capture of the whole batch has already given these warnings.
        with warnings.catch_warnings(action="ignore"), _known_derivatives():
            try:
                captured = self.recapture(part)
            except SplitError:
                raise
            except Exception as error:
                raise SplitError(f"the model cannot be captured with a part of the batch: {error}") from error
        return self.finish(replace(self.whole, program=self._divided(captured, count), divide=None), count)

    def _divided(self, part: Captured, count: int) -> Program:
        """The program of the whole batch as `count` parts, one of which is captured."""
        return microbatched(_canonical(self.whole), _canonical(part), count)


@contextmanager
def _known_derivatives() -> Iterator[None]:
    """Within, captures fail with SplitError if the backward is not autograd's own derivative of the forward: nobody
    knows how a user's autograd.Function or gradient hook combines examples."""
    with CAPTURING:
        apply, register = vars(torch.autograd.Function)["apply"], Tensor.register_hook
        plain = apply.__func__

        def known(cls: type, *args: Any, **kwargs: Any) -> Any:
            if not cls.__module__.startswith("torch."):
                raise SplitError(f"{cls.__name__} defines its own backward, which may mix examples")
            return plain(cls, *args, **kwargs)

        def hooked(tensor: Tensor, hook: Callable[..., Any]) -> Any:
            raise SplitError("the forward registers a hook for a gradient, which may mix examples")

        torch.autograd.Function.apply = classmethod(in_this_thread(known, plain))
        Tensor.register_hook = in_this_thread(hooked, register)
        try:
            yield
        finally:
            torch.autograd.Function.apply = apply
            Tensor.register_hook = register


def _first(tensor: Tensor, size: int, count: int) -> Tensor:
    if not tensor.dim() or tensor.shape[0] != size:
        return tensor
    return tensor.detach().narrow(0, 0, size // count).requires_grad_(tensor.requires_grad)


def _resized(tensor: Tensor, before: int, size: int) -> Tensor:
    if not tensor.dim() or tensor.shape[0] != before:
        return tensor
    made = torch.empty((size, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
    return made.requires_grad_(tensor.requires_grad)


def _canonical(captured: Captured) -> Program:
    program = captured.program.copy()
    canonicalize.rewrite(program, Plan())
    return program
