"""`model.optimizer(...)`: torch.optim's interface to updates that run beside the program."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from .errors import StateError
from .layout import Updates
from .states import Hyper
from .update_rules import AdamHyper, SgdHyper
from .updating import UpdatingMachine

MOMENTS = {Adam: ("exp_avg", "exp_avg_sq"), AdamW: ("exp_avg", "exp_avg_sq"), SGD: ("momentum_buffer",)}
"""The optimizers there are, and what torch calls their state."""

UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")
GROWTH_STEPS = 2000
"""Steps without an overflow after which the loss scale doubles, as in torch.amp."""


@dataclass(frozen=True)
class Declared:
    """What `model.optimizer(...)` was asked for.

    Fields:
        kind: torch.optim.AdamW, Adam or SGD.
        hyper: its keyword arguments.
        max_grad_norm: clip the norm of all gradients to this.
        in_backward: update each chunk as soon as its gradient is complete.
        accumulate: how many backwards make one step.
    """

    kind: type[Optimizer]
    hyper: dict[str, Any]
    max_grad_norm: float | None = None
    in_backward: bool = False
    accumulate: int = 1

    def check(self, dtypes: Iterable[torch.dtype]) -> None:
        """Raises ValueError for what is not there or does not go together."""
        if self.kind not in MOMENTS:
            names = ", ".join(f"torch.optim.{kind.__name__}" for kind in MOMENTS)
            raise ValueError(
                f"model.optimizer({getattr(self.kind, '__name__', self.kind)}) is not there; expected one of {names}. "
                "Any other element-wise optimizer works over model.parameters() instead"
            )
        asked = [name for name in UNSUPPORTED if self.hyper.get(name)]
        if asked:
            raise ValueError(f"model.optimizer({asked[0]}=True) is not supported; leave {asked[0]} out")
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate!r}; expected how many backwards make one step, 1 or more")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r}; expected a positive number, or None")
        if not self.in_backward:
            return
        if self.max_grad_norm is not None:
            raise ValueError(
                "in_backward=True updates before the norm of all gradients is known, so that max_grad_norm cannot be "
                "kept to; leave one of the two out"
            )
        if torch.float16 in dtypes:
            raise ValueError(
                "in_backward=True updates before it is known whether a float16 gradient overflowed; leave it out, or "
                "compile with precision='bf16'"
            )

    def updates(self) -> Updates:
        """What memory is planned for."""
        moments = len(MOMENTS[self.kind])
        if self.kind is SGD and not self.hyper.get("momentum"):
            moments = 0
        return Updates(moments, self.in_backward, self.accumulate)


class ChunkOptimizer(Optimizer):
    """AdamW, Adam or SGD over a compiled model's parameters, updated chunk by chunk where the plan says.

    Groups, schedulers, `state_dict` and `load_state_dict` are those of the torch.optim class, and so are the
    numbers. `step()` starts the updates, which run while the next forward does, and uses the gradients up: the
    next backward starts from none. With in_backward=True the updates are under way before `step()`, which then
    only ends the step. `grad_norm` is the norm of the last step's gradients where `max_grad_norm` is given,
    `loss_scale` what float16 losses are multiplied by, `skipped_steps` how many steps overflowed.
    """

    def __init__(self, declared: Declared, groups: Any, use: Callable[[], UpdatingMachine],
                 names: dict[int, str]) -> None:  # fmt: skip
        model = declared.kind(groups, **declared.hyper)  # checks hyper-parameters, fills in the defaults
        super().__init__(model.param_groups, model.defaults)
        self.declared = declared
        self.grad_norm: Tensor | None = None
        self.skipped_steps = 0
        self._names = names
        self._steps_since_overflow = 0
        unknown = [p for group in self.param_groups for p in group["params"] if id(p) not in names]
        if unknown:
            raise ValueError(
                f"a parameter of shape {tuple(unknown[0].shape)} is not the compiled model's; expected model.parameters()"
            )
        self._groups = {names[id(p)]: group for group in self.param_groups for p in group["params"]}
        self._machine = machine = use()
        self._fp16 = any(chunk.layout.dtype == torch.float16 for chunk in machine.chunks)
        machine.schedule = self._hyper
        machine.measures = declared.max_grad_norm is not None or self._fp16
        if self._fp16:
            machine.loss_scale = 2.0**16

    @property
    def loss_scale(self) -> float:
        return self._machine.loss_scale

    def _hyper(self, name: str, number: int) -> Hyper | None:
        """How update `number` of a parameter goes, by its group as it is now."""
        group = self._groups.get(name)
        if group is None:
            return None
        lr = float(group["lr"])
        if "betas" not in group:
            first = number == 1 and group["momentum"] != 0
            return SgdHyper(lr, group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"], first)
        beta1, beta2 = map(float, group["betas"])
        decoupled = self.declared.kind is AdamW or bool(group.get("decoupled_weight_decay"))
        return AdamHyper(lr, beta1, beta2, group["eps"], group["weight_decay"], number, decoupled)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Start the updates, or, with in_backward=True, end the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        machine = self._machine
        machine.worker.check()
        if self.declared.in_backward:
            if 0 < machine.backwards < self.declared.accumulate:
                raise StateError(
                    f"step() came after {machine.backwards} of accumulate={self.declared.accumulate} backwards; with "
                    "in_backward=True the last of them is what updates"
                )
        elif not machine.measures:
            machine.update_all(1.0)
        elif (scale := self._scale(machine.norm())) is not None:
            machine.update_all(scale)
        machine.backwards = 0
        return loss

    def _scale(self, norm: Tensor) -> float | Tensor | None:
        """What gradients are multiplied by; None where one of float16 overflowed, and the step is skipped."""
        self.grad_norm = norm
        if self._fp16 and not self._fits(norm):
            return None
        if self.declared.max_grad_norm is None:
            return 1.0
        return (self.declared.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def _fits(self, norm: Tensor) -> bool:
        if math.isfinite(norm.item()):
            self._steps_since_overflow += 1
            if self._steps_since_overflow == GROWTH_STEPS:
                self._steps_since_overflow = 0
                self._machine.loss_scale *= 2.0
            return True
        self._steps_since_overflow = 0
        self.skipped_steps += 1
        self._machine.forget_gradients()
        self._machine.loss_scale = max(1.0, self._machine.loss_scale / 2.0)
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that no step has used."""
        self._machine.forget_gradients()

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As the torch.optim class writes it. Tensors are the states themselves, not copies."""
        self._machine.finish()
        for group in self.param_groups:
            for parameter in group["params"]:
                found = self._state_of(parameter)
                if found is not None:
                    self.state[parameter] = found
        try:
            saved = super().state_dict()
        finally:
            self.state.clear()
        if self._fp16:
            saved["loss_scale"] = {"scale": self.loss_scale, "steps_since_overflow": self._steps_since_overflow}
        return saved

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any] | None:
        state, slot = self._machine.state_of(self._names[id(parameter)])
        if not state.steps[slot]:
            return None
        names = MOMENTS[self.declared.kind]
        moments = {name: state.slice(m, slot) for name, m in zip(names, state.moments, strict=False)}
        if self.declared.kind is SGD:
            return moments
        return {"step": torch.tensor(float(state.steps[slot])), **moments}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that this class or the torch.optim class wrote, parameter by parameter.

        Raises ValueError where it is of other parameters or another optimizer; nothing is changed then.
        """
        self._machine.finish()
        scale = state_dict.get("loss_scale")
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        names = MOMENTS[self.declared.kind]
        try:
            loads = []
            for name, parameter in ((self._names[id(p)], p) for g in self.param_groups for p in g["params"]):
                loads.append(partial(self._load, name, self.state.get(parameter, {}), names))
                _check_state(name, self.state.get(parameter, {}), names, self._machine.updates.moments)
            for load in loads:
                load()
        finally:
            self.state.clear()
        self._groups = {self._names[id(p)]: group for group in self.param_groups for p in group["params"]}
        if scale is not None and self._fp16:
            self._machine.loss_scale, self._steps_since_overflow = scale["scale"], scale["steps_since_overflow"]

    def _load(self, parameter: str, saved: dict[str, Any], names: tuple[str, ...]) -> None:
        state, slot = self._machine.state_of(parameter)
        for name, moment in zip(names, state.moments, strict=False):
            target = state.slice(moment, slot)
            target.copy_(saved[name]) if saved.get(name) is not None else target.zero_()
        default = 1 if saved else 0  # SGD does not count its steps: with a buffer there was one
        state.steps[slot] = int(saved.get("step", default))


def _check_state(parameter: str, saved: dict[str, Any], names: tuple[str, ...], moments: int) -> None:
    missing = [name for name in names[:moments] if saved and saved.get(name) is None]
    if missing:
        raise ValueError(
            f"the optimizer state of {parameter} has {', '.join(saved) or 'nothing'}, expected {', '.join(names)}; it is "
            "of another optimizer"
        )
