"""`model.optimizer(...)`: torch.optim's interface to updates that run beside the program."""

import hashlib
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..isa.errors import ArgumentError, StateError
from ..isa.formats import OwnFormat
from ..kernels.rounding import key_of
from .declared import Declared
from .hyper_checks import check_group, check_kind_stays, check_state_dict, check_unchanged
from .kinds import KINDS, check_complete, restore
from .own_store import OwnStore
from .saved_states import SavedState, check_kind, check_rule
from .states import Hyper
from .weak_method import weak_method

GROWTH_STEPS = 2000
"""Steps without an overflow after which the loss scale doubles, as in torch.amp."""

Attach = WeakMethod[Callable[[OwnStore], None]]
"""A weak reference to the method that receives the store of the states."""

Use = Callable[[OwnFormat, Attach, str], None]
"""Called with the format of the states to plan for, the method that receives their store once there is a plan, and a
digest that distinguishes this declaration from any other, on any process."""


class ChunkOptimizer(Optimizer):
    """One or several of `KINDS` over a compiled model's parameters, updated chunk by chunk where the plan puts them.

    Groups, schedulers, `state_dict`, `load_state_dict` and the numerical results are those of the torch.optim class.
    `step()` starts the updates, which run during the next forward, and consumes the gradients: the next backward
    starts from none. With in_backward=True the updates are under way before `step()`, which then only ends the step.

    Args:
        declared: what `model.optimizer(...)` was called with.
        groups: parameters or parameter groups, as for torch.optim.
        use: registers the format of the states, to be planned for.
        demand: makes a plan, or raises StateError if there is nothing to plan by.
        names: the parameters' names, by `id(parameter)`.
        fp16: whether any parameter, on any process, computes in float16; the loss is then scaled dynamically.

    `grad_norm` is the norm of the last step's gradients (None until it is measured: with `max_grad_norm` or float16),
    `loss_scale` the factor on float16 losses, `skipped_steps` the number of steps that overflowed. `store` holds the
    states, once the model has a plan.
    """

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]

    def __init__(self, declared: Declared, groups: Any, use: Use, demand: Callable[[], object],
                 names: dict[int, str], fp16: bool) -> None:  # fmt: skip
        self.declared = declared
        self.grad_norm: Tensor | None = None
        self.skipped_steps = 0
        self._names = names
        self._steps_since_overflow = 0
        self._fp16 = fp16
        self._store: OwnStore | None = None
        self._format: OwnFormat | None = None
        self._used: list[Hyper | None] = []
        self._demand = demand
        super().__init__(declared.filled(groups), declared.defaults_of(declared.kind))
        self._format = declared.format(self.param_groups, names)
        use(self._format, WeakMethod(self._attach), self._digest())

    def _digest(self) -> str:
        """A hash of what was declared, the same on every process that declares the same."""
        groups = [{**group, "params": [self._names[id(p)] for p in group["params"]]} for group in self.param_groups]
        return hashlib.sha256(repr((self.declared, groups)).encode()).hexdigest()

    def _attach(self, store: OwnStore) -> None:
        """Takes the store of the states, now that there is a plan."""
        self._store = store
        store.updater.schedule = weak_method(self._hypers)
        store.check_groups = weak_method(self._begin_updates)
        store.held.measures = self.declared.max_grad_norm is not None or self._fp16
        if self._fp16:
            store.held.loss_scale = 2.0**16

    @property
    def store(self) -> OwnStore:
        """The training states. Raises StateError if they have no plan yet and there is nothing to make one from."""
        if self._store is None:
            self._demand()
        assert self._store is not None
        return self._store

    @property
    def loss_scale(self) -> float:
        return self.store.held.loss_scale

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. Raises ArgumentError for parameters of another model, invalid options or a second
        element-wise kind, and StateError if memory was planned for another kind of optimizer; adds no group then."""
        defaults, kind, before = self.defaults, self.declared.kind_of(param_group), len(self.param_groups)
        self.defaults = self.declared.defaults_of(kind)
        try:
            super().add_param_group(param_group | {"kind": kind.__name__} if "kind" in param_group else param_group)
            self._check_added(self.param_groups[-1])
        except BaseException:
            del self.param_groups[before:]
            raise
        finally:
            self.defaults = defaults
        self._take_groups()

    def _check_added(self, group: dict[str, Any]) -> None:
        unknown = [p for p in group["params"] if id(p) not in self._names]
        if unknown:
            raise ArgumentError(
                f"params: a parameter of shape {tuple(unknown[0].shape)} does not belong to the compiled model; "
                "expected the model's own parameters"
            )
        if self._format is None:
            return  # `declared` checks the groups that the optimizer is made with
        check_group(group)
        moments = self.declared.moments_of(self.param_groups)
        rules = self.declared.rules_of(self.param_groups, self._names)
        if moments > self._format.moments or rules != self._format.rules:
            raise StateError(
                f"a group of kind {self.declared.kind_of(group).__name__} was added, but model.optimizer(...) planned "
                "its parameters' memory for another kind; pass the group when the optimizer is made"
            )

    def _take_groups(self) -> None:
        self._kinds = [self.declared.kind_of(group) for group in self.param_groups]
        self._groups = {self._names[id(p)]: group for group in self.param_groups for p in group["params"]}

    def _check_group(self, kind: type[Optimizer], group: dict[str, Any]) -> None:
        """Raises for options of a group of this kind that are invalid or that no memory was planned for."""
        check_group(group)
        assert self._format is not None
        if kind is SGD and group["momentum"] and not self._format.moments:
            raise StateError(
                f"the momentum of a group is {group['momentum']}, but no group had momentum when model.optimizer(...) "
                "planned the memory; make the optimizer with a momentum above 0, however small"
            )

    def _check_groups(self) -> None:
        """Checks all groups, whose options may change at any time and whose kinds may not."""
        for kind, group in zip(self._kinds, self.param_groups, strict=False):
            check_kind_stays(kind, self.declared.kind_of(group))
            self._check_group(kind, group)

    def _begin_updates(self) -> None:
        """Checks all groups, and keeps the hyper-parameters that updates in a backward use."""
        self._check_groups()
        self._used = self._now()

    def _now(self) -> list[Hyper | None]:
        return [self._hyper(group, 1, None) for group in self.param_groups]

    def _hypers(self, asked: list[tuple[str, int]]) -> list[Hyper | None]:
        """The hyper-parameters of parameters' updates, each asked for by a name and a number, from their groups as they
        are now; None if in no group. Where masters are exact, those of one group and number are made once."""
        groups = [self._groups.get(name) for name, _ in asked]
        if self.declared.masters != "exact":
            keys = [key_of(self.declared.seed, number, name) for name, number in asked]
            return [self._hyper(group, number, key)
                    for group, (_, number), key in zip(groups, asked, keys, strict=True)]  # fmt: skip
        made: dict[tuple[int, int], Hyper | None] = {}
        for group, (_, number) in zip(groups, asked, strict=True):
            if (id(group), number) not in made:
                made[id(group), number] = self._hyper(group, number, None)
        return [made[id(group), number] for group, (_, number) in zip(groups, asked, strict=True)]

    def _hyper(self, group: dict[str, Any] | None, number: int, key: int | None) -> Hyper | None:
        if group is None:
            return None
        return KINDS[self.declared.kind_of(group)].make(group, number, key)

    def moments_of(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes, before any sharding, of what is kept of a parameter, by torch's names."""
        return KINDS[self._kind_of(name)].moments_of(self.store.chunks.whole_shape(name))

    def counts(self, name: str) -> bool:
        """Whether the number of a parameter's updates is part of its state."""
        return self.declared.counts(self._kind_of(name))

    def _kind_of(self, name: str) -> type[Optimizer]:
        return self.declared.kind_of(self._groups[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Starts the updates or, with in_backward=True, ends the step."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if self._store is None:
            return loss  # the model was not called yet
        store = self._store
        store.check_gradients()
        self._check_groups()
        if self.declared.in_backward and 0 < store.backwards < self.declared.accumulate:
            raise StateError(
                f"step() came after {store.backwards} of accumulate={self.declared.accumulate} backwards; with "
                "in_backward=True the last of them performs the update, so call step() after it"
            )
        if self.declared.in_backward and store.backwards:
            check_unchanged(self._used, self._now()[: len(self._used)])
        self._check_zeroed(store)
        if not store.held.measures:
            # With in_backward only the gradients that the last backward did not reach are left.
            store.update_all(1.0)
        else:
            self._measured_step(store.held.norm())
        return loss

    def _check_zeroed(self, store: OwnStore) -> None:
        try:
            store.zeroed.step(lambda place: store.chunks.layout.chunks[place[0]].slots[place[1]].name)
        except StateError:
            if self.declared.in_backward:  # the others are updated already, for good: let the next step begin
                store.backwards = 0
                store.zeroed.drop()
            raise

    def _measured_step(self, norm: Tensor) -> None:
        """Updates with clipped gradients, or skips the step where a float16 gradient overflowed."""
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
        """The norm of the gradients that the next step would use, before clipping; needs max_grad_norm= or float16.

        Raises StateError if norms are not measured, or in_backward=True has used the gradients up.
        """
        if not self.store.held.measures:
            raise StateError("gradients are measured only with max_grad_norm=; pass it to model.optimizer(...)")
        return self.store.held.norm()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients that no step has used."""
        if self._store is None:
            super().zero_grad(set_to_none)
        else:
            self._store.zero_grad(set_to_none)

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self, *, first_only: bool = False) -> dict[str, Any]:
        """A state_dict as the torch.optim class writes it. Its tensors are the states themselves, not copies; moments
        that are not stored exactly are copied to the master's dtype, from which they load as the same bits.

        States of parameters that are sharded, in divided chunks, or of layers on other processes are gathered, by all
        processes together, into whole copies on the CPU. With `first_only` only rank 0 keeps them; the other ranks get
        an empty dict.
        """
        if self._store is None:
            return super().state_dict()
        self._store.finish()
        updated = self._updated()
        for group in self.param_groups:
            for parameter in group["params"]:
                name = self._names[id(parameter)]
                if name in updated:
                    self.state[parameter] = self._state_of(name, *updated[name])
        try:
            saved = super().state_dict()
        finally:
            self.state.clear()
        saved |= self.scaling()
        return self._whole(saved, first_only)

    def scaling(self) -> dict[str, Any]:
        """The state_dict's entries for loss scaling; empty without float16."""
        if not self._fp16:
            return {}
        return {"loss_scale": {"scale": self.loss_scale, "steps_since_overflow": self._steps_since_overflow}}

    def _whole(self, saved: dict[str, Any], first_only: bool) -> dict[str, Any]:
        """Replaces the shards in a state_dict with whole tensors, one by one; empty on ranks that do not keep it."""
        store, kept = self.store, not first_only or self.store.zero.ranks.rank == 0
        order = [self._names[id(p)] for group in self.param_groups for p in group["params"]]
        for number, values in saved["state"].items():
            parameter = order[number]
            shared_out = store.is_shared_out(parameter)
            for name in (name for name in self.moments_of(parameter) if shared_out and name in values):
                whole = store.chunks.whole(parameter, store.join(values[name], parameter), store.hardware.device)
                values[name] = whole if kept else None
        return saved if kept else {}

    def _updated(self) -> dict[str, tuple[int, list[torch.dtype]]]:
        """The updates so far and the moments' dtypes of every parameter that was updated, on whichever process."""
        store, found = self.store, dict[str, tuple[int, list[torch.dtype]]]()
        for name in store.chunks.ownership.among(self._groups):
            state, slot = store.state_of(name)
            if state.steps[slot]:
                found[name] = state.steps[slot], [state.layout.master_dtype] * len(state.moment_places(slot))
        return store.chunks.ownership.gather(found)

    def _state_of(self, parameter: str, steps: int, dtypes: list[torch.dtype]) -> dict[str, Any]:
        """This process's shard of a parameter's state, by torch's names; meta tensors where other processes hold it."""
        chunks = self.store.chunks
        shapes = self.moments_of(parameter)
        if parameter in chunks.elsewhere:
            pairs = zip(shapes.values(), dtypes, strict=False)
            parts = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in pairs]
        else:
            parts = self.store.moments_of(parameter)
        moments = dict(zip(shapes, parts, strict=False))
        return {"step": torch.tensor(float(steps)), **moments} if self.counts(parameter) else moments

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state that this class or the torch.optim class wrote, by parameter. Tensors are whole, not shards.

        Raises ValueError if it is of other parameters or another optimizer; nothing is changed then.
        """
        check_state_dict(state_dict)
        self.check_saved(state_dict["param_groups"])
        if self._store is None and not state_dict["state"]:  # as optimizer wrappers do before the first step
            self._load_groups(state_dict)
            self._take_groups()
            return
        self.store.finish()
        before = self.param_groups
        self._load_groups({key: state_dict[key] for key in ("state", "param_groups")})
        try:
            states = {self._names[id(p)]: self.state.get(p, {}) for g in self.param_groups for p in g["params"]}
            named = {name: states[name] for name in self.store.chunks.ownership.among(states)}
            self._check_states(named)
        except BaseException:
            self.param_groups = before
            raise
        finally:
            self.state.clear()
        for name, saved in named.items():
            self._load(name, saved)
        self._take_groups()
        scale = state_dict.get("loss_scale")
        if scale is not None and self._fp16:
            self.store.held.loss_scale, self._steps_since_overflow = scale["scale"], scale["steps_since_overflow"]

    def _load_groups(self, state_dict: dict[str, Any]) -> None:
        """Loads by torch.optim's method, which replaces all options of a group; each group keeps its own kind."""
        before = self.param_groups
        super().load_state_dict(state_dict)
        for own, loaded in zip(before, self.param_groups, strict=True):
            loaded.pop("kind", None)
            loaded |= {"kind": own["kind"]} if "kind" in own else {}
            restore(self.declared.kind_of(own), loaded)

    def check_saved(self, groups: list[dict[str, Any]]) -> None:
        """Raises ValueError if saved groups are of another optimizer, and StateError if no memory was planned for
        their options."""
        for own, group in zip(self.param_groups, groups, strict=False):
            kind = self.declared.kind_of(own)
            check_kind(kind.__name__, group)
            check_rule(kind.__name__, self.declared.defaults_of(kind), [own], [group])
            self._check_group(kind, group)
            restored = dict(group)
            restore(kind, restored)
            check_complete(kind, restored)

    def check_state(self, parameter: str, saved: SavedState) -> None:
        """Raises ValueError if a parameter's saved state is not what this optimizer keeps of it, or finds no room."""
        assert self._format is not None
        kind = KINDS[self._kind_of(parameter)]
        keeps_any = kind.rule != "elements" or self._format.moments > 0
        saved.check(parameter, self.moments_of(parameter) if keeps_any else {}, counts=kind.counts)
        saved.check_room(parameter, self.store.chunks.layout)

    def _check_states(self, named: dict[str, dict[str, Any]]) -> None:
        """Raises on all processes where a state does not fit on any one of them."""
        error = None
        try:
            for name, saved in named.items():
                self.check_state(name, SavedState.of(saved))
        except ValueError as caught:
            error = caught
        self.store.chunks.ownership.raise_alike(error)

    def _load(self, parameter: str, saved: dict[str, Any]) -> None:
        store, local_shards = self.store, self.store.chunks.local_shards
        (state, slot), (chunk, _) = store.state_of(parameter), store.place_of(parameter)
        told, places = SavedState.of(saved), state.moment_places(slot)
        for number, (name, (_, place)) in enumerate(zip(self.moments_of(parameter), places, strict=False)):
            shard = None if told.is_empty else local_shards.take(saved[name], chunk.slots[slot])
            values = torch.zeros(place.shape) if shard is None else store.take(shard, parameter)
            state.write_moment(number, slot, values)
        state.steps[slot] = told.steps
