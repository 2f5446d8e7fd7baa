"""What `model.optimizer(...)` is asked for, and what training state that takes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from ..isa.errors import ArgumentError, wrong_argument
from ..isa.formats import OwnFormat
from ..isa.moments import Masters, Moments
from .hyper_checks import check_group, is_number
from .lion import Lion

MOMENTS = {
    Adam: ("exp_avg", "exp_avg_sq"), AdamW: ("exp_avg", "exp_avg_sq"), SGD: ("momentum_buffer",), Lion: ("exp_avg",),
}  # fmt: skip
"""The optimizers there are, and what torch calls their state."""


@dataclass(frozen=True)
class Declared:
    """What `model.optimizer(...)` was asked for.

    Fields:
        kind: torch.optim.AdamW, Adam or SGD, or Lion.
        hyper: its keyword arguments.
        max_grad_norm: clip the norm of all gradients to this.
        in_backward: update each chunk as soon as its gradient is complete.
        accumulate: how many backwards make one step.
        moments: how the optimizer's values are stored.
        masters: how the float32 masters are.
        seed: what rounding by chance draws with.
    """

    kind: type[Optimizer]
    hyper: dict[str, Any]
    max_grad_norm: float | None = None
    in_backward: bool = False
    accumulate: int = 1
    moments: Moments = "exact"
    masters: Masters = "exact"
    seed: int = 0

    @property
    def counts(self) -> bool:
        """Whether the rule goes by how many steps a parameter has taken."""
        return self.kind in (Adam, AdamW)

    @property
    def saves_steps(self) -> bool:
        """Whether steps are a part of a parameter's state: those of what rounds by chance are, too, which draws by
        them."""
        return self.counts or self.masters != "exact"

    def check(self, dtypes: Iterable[torch.dtype]) -> None:
        """Raises ArgumentError for what is not there or does not go together."""
        if isinstance(self.kind, Optimizer):
            name = _name(type(self.kind))
            raise ArgumentError(f"kind: model.optimizer(...) takes the class {name}, not an instance of it")
        if self.kind is Muon:
            raise ArgumentError(
                "kind: torch.optim.Muon updates whole matrices, and updates here are of single elements; pass "
                f"{', '.join(map(_name, MOMENTS))}"
            )
        if not isinstance(self.kind, type) or self.kind not in MOMENTS:
            names = ", ".join(map(_name, MOMENTS))
            raise wrong_argument(
                "kind",
                self.kind,
                f"one of {names}. Any other element-wise optimizer works over model.parameters() instead",
            )
        check_group(self.hyper)
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise wrong_argument("accumulate", self.accumulate, "how many backwards make one step, 1 or more")
        if type(self.in_backward) is not bool:
            raise wrong_argument("in_backward", self.in_backward, "True or False")
        norm = self.max_grad_norm
        if norm is not None and not (is_number(norm) and 0 < norm < math.inf):
            raise wrong_argument("max_grad_norm", norm, "a positive number, or None")
        if self.moments not in get_args(Moments):
            raise wrong_argument("moments", self.moments, f"one of {', '.join(map(repr, get_args(Moments)))}")
        if self.masters not in get_args(Masters):
            raise wrong_argument("masters", self.masters, f"one of {', '.join(map(repr, get_args(Masters)))}")
        if type(self.seed) is not int:
            raise wrong_argument("seed", self.seed, "an int")
        if self.in_backward:
            self._check_in_backward(dtypes)

    def check_masters(self, trained: Mapping[str, tuple[torch.dtype, torch.dtype]], *, sharded: bool) -> None:
        """Raises ArgumentError where these cannot be the weights alone. `trained`: by name the dtypes of parameters'
        masters, and those that they compute in; `sharded`: processes have parts of single parameters."""
        if self.masters == "exact":
            return
        if sharded:
            raise ArgumentError(
                f"masters={self.masters!r} draws by the numbers of a parameter's elements, which are not known where "
                "tensors are sharded over processes; leave it out, or tensor= out of parallel="
            )
        if (torch.float32, torch.bfloat16) not in trained.values():
            told = ", ".join(
                f"{name} is {own} and computes in {computing}" for name, (own, computing) in trained.items()
            )
            raise ArgumentError(
                f"masters={self.masters!r} is of float32 masters of weights that compute in bfloat16, and none that is "
                f"trained does{': ' * bool(told)}{told[:200]}; compile with precision='bf16', or leave it out"
            )

    def _check_in_backward(self, dtypes: Iterable[torch.dtype]) -> None:
        if self.max_grad_norm is not None:
            raise ArgumentError(
                "in_backward=True updates before the norm of all gradients is known, so that max_grad_norm cannot be "
                "kept to; leave one of the two out"
            )
        if torch.float16 in dtypes:
            raise ArgumentError(
                "in_backward=True updates before it is known whether a float16 gradient overflowed; leave it out, or "
                "compile with precision='bf16'"
            )

    def of_torch(self, groups: Any) -> Optimizer:
        """The optimizer of torch's that fills in the defaults. Raises ArgumentError for what it does not take."""
        try:
            made = self.kind(groups, **self.hyper)
        except (TypeError, ValueError, KeyError) as error:
            raise ArgumentError(
                f"{_name(self.kind)} does not take these params and options: {error}; expected "
                "parameters of the model, or groups of them, and options that it has"
            ) from error
        for group in made.param_groups:
            check_group(group)
        return made

    def format(self, groups: list[dict[str, Any]]) -> OwnFormat:
        """What memory is planned for, with these groups of parameters."""
        moments = len(MOMENTS[self.kind])
        if self.kind is SGD and not any(group["momentum"] for group in groups):
            moments = 0
        if self.moments != "exact" and not moments:
            raise ArgumentError(
                f"moments={self.moments!r}: {_name(self.kind)} without momentum has no moments to store; "
                "leave it out, or give a momentum above 0"
            )
        return OwnFormat(moments, self.in_backward, self.accumulate, self.moments, self.masters)


def _name(kind: type[Optimizer]) -> str:
    """As users write it."""
    return f"geminifx.{kind.__name__}" if kind is Lion else f"torch.optim.{kind.__name__}"
