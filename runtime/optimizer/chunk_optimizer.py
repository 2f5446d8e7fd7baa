"""`model.optimizer(...)`: torch.optim's interface to updates that run beside the program."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..isa.errors import ArgumentError, StateError, wrong_argument
from ..isa.formats import OwnFormat
from ..isa.moments import Moments
from ..kernels.update_rules import AdamHyper, SgdHyper
from .hyper_checks import check_group, check_state_dict, is_number
from .own_store import OwnStore
from .saved_groups import check_rule
from .states import Hyper
from .weak_method import weak_method

MOMENTS = {Adam: ("exp_avg", "exp_avg_sq"), AdamW: ("exp_avg", "exp_avg_sq"), SGD: ("momentum_buffer",)}
"""The optimizers there are, and what torch calls their state."""

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
        moments: how the optimizer's values are stored.
    """

    kind: type[Optimizer]
    hyper: dict[str, Any]
    max_grad_norm: float | None = None
    in_backward: bool = False
    accumulate: int = 1
    moments: Moments = "exact"

    def check(self, dtypes: Iterable[torch.dtype]) -> None:
        """Raises ArgumentError for what is not there or does not go together."""
        if isinstance(self.kind, Optimizer):
            name = type(self.kind).__name__
            raise ArgumentError(f"kind: model.optimizer(...) takes the class torch.optim.{name}, not an instance of it")
        if not isinstance(self.kind, type) or self.kind not in MOMENTS:
            names = ", ".join(f"torch.optim.{kind.__name__}" for kind in MOMENTS)
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
        if self.in_backward:
            self._check_in_backward(dtypes)

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
                f"torch.optim.{self.kind.__name__} does not take these params and options: {error}; expected "
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
                f"moments={self.moments!r}: torch.optim.{self.kind.__name__} without momentum has no moments to store; "
                "leave it out, or give a momentum above 0"
            )
        return OwnFormat(moments, self.in_backward, self.accumulate, self.moments)


Attach = WeakMethod[Callable[[OwnStore], None]]
"""Who is given the store of the states, if he is still there."""

Use = Callable[[OwnFormat, Attach], None]
"""Declares of what states are to consist, and who is given the store of them once there is a plan."""


class ChunkOptimizer(Optimizer):
    """AdamW, Adam or SGD over a compiled model's parameters, updated chunk by chunk where the plan says.

    Groups, schedulers, `state_dict` and `load_state_dict` are those of the torch.optim class, and so are the
    numbers. `step()` starts the updates, which run while the next forward does, and uses the gradients up: the
    next backward starts from none. With in_backward=True the updates are under way before `step()`, which then
    only ends the step. `grad_norm` is the norm of the last step's gradients where `max_grad_norm` is given,
    `loss_scale` what float16 losses are multiplied by, `skipped_steps` how many steps overflowed. `store`
    has the states; there are none before the model has a plan.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, declared: Declared, groups: Any, use: Use, demand: Callable[[], object],
                 names: dict[int, str]) -> None:  # fmt: skip
        model = declared.of_torch(groups)
        self.declared = declared
        self.grad_norm: Tensor | None = None
        self.skipped_steps = 0
        self._names = names
        self._steps_since_overflow = 0
        self._fp16 = False
        self._store: OwnStore | None = None
        self._demand = demand
        super().__init__(model.param_groups, model.defaults)
        self._format = declared.format(self.param_groups)
        use(self._format, WeakMethod(self._attach))

    def _attach(self, store: OwnStore) -> None:
        """There is a plan, and so there are states to update."""
        self._store = store
        self._fp16 = any(chunk.dtype == torch.float16 for chunk in store.chunks.layout.chunks)
        store.updater.schedule = weak_method(self._hyper)
        store.check_groups = weak_method(self._check_groups)
        store.held.measures = self.declared.max_grad_norm is not None or self._fp16
        if self._fp16:
            store.held.loss_scale = 2.0**16

    @property
    def store(self) -> OwnStore:
        """The states. Raises StateError where there is no plan for them yet and nothing to make one by."""
        if self._store is None:
            self._demand()
        assert self._store is not None
        return self._store

    @property
    def loss_scale(self) -> float:
        return self.store.held.loss_scale

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's. Raises ArgumentError for parameters of another model."""
        super().add_param_group(param_group)
        unknown = [p for p in self.param_groups[-1]["params"] if id(p) not in self._names]
        if unknown:
            del self.param_groups[-1]
            raise ArgumentError(
                f"params: one of shape {tuple(unknown[0].shape)} is not the compiled model's; expected parameters of it"
            )
        self._take_groups()

    def _take_groups(self) -> None:
        self._groups = {self._names[id(p)]: group for group in self.param_groups for p in group["params"]}

    def _check_group(self, group: dict[str, Any]) -> None:
        """Groups may be changed at any time, but not to what makes no sense or was not planned for."""
        check_group(group)
        if group.get("momentum") and not self._format.moments:
            raise StateError(
                f"the momentum of a group is {group['momentum']}, but none had any when model.optimizer(...) planned "
                "its memory; make the optimizer with a momentum above 0, however small"
            )

    def _check_groups(self) -> None:
        for group in self.param_groups:
            self._check_group(group)

    def _hyper(self, name: str, number: int) -> Hyper | None:
        """How update `number` of a parameter goes, by its group as it is now."""
        group = self._groups.get(name)
        if group is None:
            return None
        lr = float(group["lr"])
        if "betas" not in group:
            momentum = float(group["momentum"])
            first = number == 1 and momentum != 0
            return SgdHyper(lr, momentum, group["dampening"], group["weight_decay"], group["nesterov"], first)
        beta1, beta2 = map(float, group["betas"])
        decoupled = self.declared.kind is AdamW or bool(group.get("decoupled_weight_decay"))
        return AdamHyper(lr, beta1, beta2, group["eps"], group["weight_decay"], number, decoupled)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Start the updates, or, with in_backward=True, end the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._store is None:
            return loss  # the model was not called yet
        store = self._store
        store.check_gradients()
        self._check_groups()
        if self.declared.in_backward and 0 < store.backwards < self.declared.accumulate:
            raise StateError(
                f"step() came after {store.backwards} of accumulate={self.declared.accumulate} backwards; with "
                "in_backward=True the last of them is what updates"
            )
        self._check_zeroed(store)
        if not store.held.measures:
            # With in_backward what is left are gradients of earlier backwards that the last one had no part in.
            store.update_all(1.0)
        else:
            self._measured_step(store.held.norm())
        return loss

    def _check_zeroed(self, store: OwnStore) -> None:
        try:
            store.zeroed.step(lambda place: store.chunks.layout.chunks[place[0]].slots[place[1]].name)
        except StateError:
            if self.declared.in_backward:  # the others are updated, and that cannot be undone: the next step may come
                store.backwards = 0
                store.zeroed.drop()
            raise

    def _measured_step(self, norm: Tensor) -> None:
        """Update by gradients that are clipped to a norm, or not at all where one of float16 overflowed."""
        self.grad_norm = norm
        store, most = self.store, self.declared.max_grad_norm
        if self._fp16 and not math.isfinite(norm.item()):
            self._steps_since_overflow = 0
            self.skipped_steps += 1
            store.zero_grad(set_to_none=True)
            store.held.loss_scale = max(1.0, store.held.loss_scale / 2.0)
            return
        store.update_all(1.0 if most is None else (most / (norm + 1e-6)).clamp(max=1.0))
        self._steps_since_overflow += self._fp16
        if self._steps_since_overflow == GROWTH_STEPS:
            self._steps_since_overflow = 0
            store.held.loss_scale *= 2.0

    def gradient_norm(self) -> Tensor:
        """The norm of the gradients that the next step would use, before any clipping; for max_grad_norm= or fp16.

        Raises StateError where norms are not measured, or in_backward=True has used the gradients up.
        """
        if not self.store.held.measures:
            raise StateError("gradients are measured only with max_grad_norm=; pass it to model.optimizer(...)")
        return self.store.held.norm()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that no step has used."""
        if self._store is None:
            super().zero_grad(set_to_none)
        else:
            self._store.zero_grad(set_to_none)

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self, *, first_only: bool = False) -> dict[str, Any]:
        """As the torch.optim class writes it. Tensors are the states themselves, not copies; of moments that are not
        stored exactly, copies in the master's dtype, which are loaded as the same bits again.

        Of parameters that are sharded over processes, or lie in divided chunks, they are whole, and copies on the CPU,
        made by all processes together; with `first_only` rank 0 alone keeps them, and the others get an empty dict.
        """
        if self._store is None:
            return super().state_dict()
        self._store.finish()
        for group in self.param_groups:
            for parameter in group["params"]:
                found = self._state_of(parameter)
                if found is not None:
                    self.state[parameter] = found
        try:
            saved = super().state_dict()
        finally:
            self.state.clear()
        saved |= self.scaling()
        return self._whole(saved, first_only)

    def scaling(self) -> dict[str, Any]:
        """What a state_dict has of the loss scale: nothing without float16."""
        if not self._fp16:
            return {}
        return {"loss_scale": {"scale": self.loss_scale, "steps_since_overflow": self._steps_since_overflow}}

    def _whole(self, saved: dict[str, Any], first_only: bool) -> dict[str, Any]:
        """A state_dict of this process's shards with whole tensors instead, made one by one."""
        local_shards, kept = self.store.chunks.local_shards, not first_only or self.store.zero.ranks.rank == 0
        order = [self._names[id(p)] for group in self.param_groups for p in group["params"]]
        for number, values in saved["state"].items():
            chunk, slot = self.store.place_of(order[number])
            place = chunk.slots[slot]
            shared_out = place.placement or chunk.shards > 1
            for name in (name for name in MOMENTS[self.declared.kind] if shared_out and name in values):
                whole = local_shards.join(
                    self.store.join(values[name], order[number]), place, self.store.hardware.device
                )
                values[name] = whole if kept else None
        return saved if kept else {}

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any] | None:
        """This process's shard of a parameter's state, in torch's names."""
        state, slot = self.store.state_of(self._names[id(parameter)])
        if not state.steps[slot]:
            return None
        names = MOMENTS[self.declared.kind]
        moments = {names[number]: state.read_moment(number, slot) for number in range(len(state.moments))}
        if self.declared.kind is SGD:
            return moments
        return {"step": torch.tensor(float(state.steps[slot])), **moments}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that this class or the torch.optim class wrote, parameter by parameter. Tensors are whole.

        Raises ValueError where it is of other parameters or another optimizer; nothing is changed then.
        """
        check_state_dict(state_dict)
        self.check_saved(state_dict["param_groups"])
        if self._store is None and not state_dict["state"]:  # as wrappers of optimizers do before the first step
            super().load_state_dict(state_dict)
            self._take_groups()
            return
        self.store.finish()
        before = self.param_groups
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        try:
            named = [(self._names[id(p)], self.state.get(p, {})) for g in self.param_groups for p in g["params"]]
            for name, saved in named:
                self._check_state(name, saved)
        except BaseException:
            self.param_groups = before
            raise
        finally:
            self.state.clear()
        for name, saved in named:
            self._load(name, saved)
        self._take_groups()
        scale = state_dict.get("loss_scale")
        if scale is not None and self._fp16:
            self.store.held.loss_scale, self._steps_since_overflow = scale["scale"], scale["steps_since_overflow"]

    def check_saved(self, groups: list[dict[str, Any]]) -> None:
        """Raises ValueError where saved groups are of another optimizer, and StateError where no memory was planned for
        what they ask for."""
        check_rule(self.declared.kind.__name__, self.defaults, self.param_groups, groups)
        for group in groups:
            self._check_group(group)

    def _check_state(self, parameter: str, saved: dict[str, Any]) -> None:
        (state, slot), (chunk, _) = self.store.state_of(parameter), self.store.place_of(parameter)
        shape = self.store.chunks.local_shards.whole_shape(chunk.slots[slot])
        names = MOMENTS[self.declared.kind]
        for name in names[: len(state.moments)] if saved else ():
            found = saved.get(name)
            if found is None:
                raise ValueError(
                    f"the optimizer state of {parameter} has {', '.join(saved)}, expected {', '.join(names)}; it is of "
                    "another optimizer"
                )
            if tuple(found.shape) != shape:
                raise ValueError(
                    f"the optimizer state of {parameter} has {name} of shape {tuple(found.shape)}, expected {shape}; "
                    "it is of another model"
                )

    def _load(self, parameter: str, saved: dict[str, Any]) -> None:
        store, local_shards = self.store, self.store.chunks.local_shards
        (state, slot), (chunk, _) = store.state_of(parameter), store.place_of(parameter)
        for number, name in enumerate(MOMENTS[self.declared.kind][: len(state.moments)]):
            values = torch.zeros(state.layout.slots[slot].shape)
            if saved:
                values = store.take(local_shards.take(saved[name], chunk.slots[slot]), parameter)
            state.write_moment(number, slot, values)
        default = 1 if saved else 0  # SGD does not count its steps: with a buffer there was one
        state.steps[slot] = int(saved.get("step", default))
