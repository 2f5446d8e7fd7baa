"""Lion in plain torch: computes what `model.optimizer(Lion, ...)` does, for any parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ..isa.errors import ArgumentError
from .hyper_checks import check_group


class Lion(Optimizer):
    """Lion: updates by the sign of a running mean, with a single moment, half of AdamW's state.

    Chen et al., "Symbolic discovery of optimization algorithms" (2023). Weight decay is decoupled. The learning rate
    should be three to ten times smaller than AdamW's, and weight decay larger by the same factor.

    Raises:
        ArgumentError: an option is no number or out of range.
    """

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        check_group(defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                if parameter.grad.is_sparse:
                    raise ArgumentError(
                        "Lion needs dense gradients, but this one is sparse; make the embedding with sparse=False"
                    )
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                update(parameter, parameter.grad, state["exp_avg"], group)
        return loss


def update(weight: torch.Tensor, gradient: torch.Tensor, mean: torch.Tensor, group: dict[str, Any]) -> None:
    """Updates a weight and its moment in place."""
    beta1, beta2 = group["betas"]
    mixed = (mean * beta1).add_(gradient, alpha=1 - beta1)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(torch.where(mixed.isnan(), mixed, mixed.sign()), alpha=-group["lr"])
    mean.mul_(beta2).add_(gradient, alpha=1 - beta2)
