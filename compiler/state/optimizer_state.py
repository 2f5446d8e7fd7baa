"""An optimizer's state in a checkpoint, by parameter: tensors, sharded as the parameters are, and numbers."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...runtime.isa.errors import CheckpointError, StateError
from ...runtime.isa.precision import is_exact
from ...runtime.memory.stored import Stored
from ...runtime.optimizer.chunk_optimizer import ChunkOptimizer
from ...runtime.optimizer.saved_states import SavedState, check_rule
from ..session import Session

_logger = logging.getLogger(__name__)

Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""The shape and dtype of each tensor in a checkpoint, by name."""


class OptimizerState(ABC):
    """Reads and writes one optimizer's state; one subclass is for our optimizer, the other for torch's."""

    def __init__(self, session: Session, optimizer: Optimizer) -> None:
        self.session = session
        self.optimizer = optimizer
        self.names = session.names()
        self.parameters = {self.names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
        self.ownership = session.store().chunks.ownership
        self.held = self.ownership.among(self.parameters)

    @staticmethod
    def of(session: Session, optimizer: Optimizer) -> "OptimizerState":
        if isinstance(optimizer, ChunkOptimizer):
            return _OwnState(session, optimizer)
        return _TorchState(session, optimizer)

    # -- saving --------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Stored]:
        found = ((name, self._tensors(name)) for name in self.held)
        return {f"optimizer.{key}.{name}": stored for name, own in found for key, stored in own.items()}

    def numbers(self) -> dict[str, Any]:
        """Everything but tensors, for all parameters, gathered from the processes that hold them; by names of
        parameters."""
        own = self.optimizer.param_groups
        groups = [{**group, "params": [self.names[id(p)] for p in group["params"]]} for group in own]
        numbers = {name: found for name in self.held if (found := self._numbers(name))}
        return {"kind": self.kind, "param_groups": groups, "numbers": self.ownership.gather(numbers)}

    @property
    def kind(self) -> str:
        """The name of the optimizer class whose update rule it follows, such as AdamW."""
        return type(self.optimizer).__name__

    @abstractmethod
    def _tensors(self, name: str) -> dict[str, Stored]: ...

    @abstractmethod
    def _numbers(self, name: str) -> dict[str, Any]: ...

    # -- loading -------------------------------------------------------------------------------------------

    def check(self, saved: Any, found: Tensors) -> None:
        """Raises CheckpointError if the checkpoint is of another optimizer."""
        if saved is None:
            raise CheckpointError("the checkpoint contains no optimizer state; load it with optimizer=None")
        if not isinstance(saved, dict) or not {"param_groups", "numbers"} <= saved.keys():
            raise CheckpointError("the optimizer state in the checkpoint was not saved by save_checkpoint")
        kind = saved.get("kind", self.kind)  # which older checkpoints lack
        if kind != self.kind:
            raise CheckpointError(
                f"the checkpoint was saved with {kind}, but the optimizer is {self.kind}; make an optimizer of that "
                "kind, or load only the model with optimizer=None"
            )
        self._check_groups(saved["param_groups"])
        try:
            self._check_rule(saved["param_groups"])
            for name in self.parameters:
                self._check_state(name, self._saved_state(name, saved, found))
                self._check_dtypes(name, found)
        except (ValueError, StateError) as error:
            raise CheckpointError(f"nothing was loaded: {error}") from error

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Raises CheckpointError if the saved groups hold other parameters."""
        before = [set(group["params"]) for group in groups]
        now = [{self.names[id(p)] for p in group["params"]} for group in self.optimizer.param_groups]
        if before != now:
            raise CheckpointError(
                f"the optimizer has {len(now)} group(s) of {', '.join(str(len(g)) for g in now)} parameters, but the "
                f"checkpoint has {len(before)} of {', '.join(str(len(g)) for g in before)}, or other parameters in "
                "them; make the same groups"
            )

    def _check_rule(self, groups: list[dict[str, Any]]) -> None:
        """Raises ValueError or StateError if the saved state follows another update rule."""
        check_rule(self.kind, self.optimizer.defaults, self.optimizer.param_groups, groups)

    def _check_state(self, name: str, saved: SavedState) -> None:
        """Raises ValueError if what was saved for a parameter is not its state."""
        shape = self.session.store().chunks.whole_shape(name)
        saved.check(name, dict.fromkeys(saved.shapes, shape), counts=False)

    def _check_dtypes(self, name: str, found: Tensors) -> None:
        """Raises CheckpointError if the dtype of a parameter's master cannot hold its saved state exactly."""
        expected = self.session.store().chunks.dtype_of(name)
        for key in self._saved_keys(name, found):
            _, dtype = found[f"optimizer.{key}.{name}"]
            if not is_exact(dtype, expected):
                raise CheckpointError(f"the checkpoint has {key} of {name} as {dtype}, expected {expected}")

    @abstractmethod
    def begin_load(self, saved: dict[str, Any], found: Tensors) -> dict[str, Stored]:
        """Prepares to load, and returns the tensors to read into."""

    @abstractmethod
    def end_load(self, saved: dict[str, Any]) -> None:
        """Called once those tensors are read."""

    def _load_numbers(self, saved: dict[str, Any], states: dict[str, dict[str, Any]]) -> None:
        order = {name: i for i, name in enumerate(self.parameters)}
        groups = [
            {**group, "params": [order[self.names[id(p)]] for p in own["params"]]}
            for group, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        by_number = {order[name]: state for name, state in states.items() if state}
        scale = {key: saved[key] for key in ("loss_scale",) if key in saved}
        self.optimizer.load_state_dict({"state": by_number, "param_groups": groups, **scale})

    def _saved_state(self, name: str, saved: dict[str, Any], found: Tensors) -> SavedState:
        shapes = {key: found[f"optimizer.{key}.{name}"][0] for key in self._saved_keys(name, found)}
        return SavedState(shapes, saved["numbers"].get(name, {}).get("step"))

    def _saved_keys(self, name: str, found: Tensors) -> list[str]:
        """The names of the tensors that a checkpoint holds for a parameter, such as exp_avg."""
        keys = sorted({name.split(".")[1] for name in found if name.startswith("optimizer.")})
        return [key for key in keys if f"optimizer.{key}.{name}" in found]


class _OwnState(OptimizerState):
    """The state of `model.optimizer(...)`: it lies in the store, and is read and written in place."""

    def __init__(self, session: Session, optimizer: ChunkOptimizer) -> None:
        super().__init__(session, optimizer)
        self.store = optimizer.store
        self.own = optimizer
        self.scaling = optimizer.scaling

    def numbers(self) -> dict[str, Any]:
        format = self.store.format
        return {**super().numbers(), **self.scaling(), "stored": format.stored, "masters": format.masters}

    def _tensors(self, name: str) -> dict[str, Stored]:
        state, slot = self.store.state_of(name)
        return self._stored(name) if state.steps[slot] else {}

    def _stored(self, name: str) -> dict[str, Stored]:
        return dict(zip(self.own.moments_of(name), self.store.stored_moments(name), strict=False))

    def _numbers(self, name: str) -> dict[str, Any]:
        state, slot = self.store.state_of(name)
        counts = state.steps[slot] and self.own.counts(name)
        return {"step": torch.tensor(float(state.steps[slot]))} if counts else {}

    @property
    def kind(self) -> str:
        return self.own.declared.kind.__name__

    def _check_rule(self, groups: list[dict[str, Any]]) -> None:
        self.own.check_saved(groups)

    def _check_state(self, name: str, saved: SavedState) -> None:
        self.own.check_state(name, saved)

    def begin_load(self, saved: dict[str, Any], found: Tensors) -> dict[str, Stored]:
        self._load_numbers(saved, {})
        format = self.store.format
        for what, key, now in (("moments", "stored", format.stored), ("masters", "masters", format.masters)):
            before = saved.get(key, "exact")
            if before != now:
                _logger.warning(
                    "the checkpoint's %s were stored as %s; they are now stored as %s=%r", what, before, what, now
                )
        read: dict[str, Stored] = {}
        for name in self.held:
            keys = self._saved_keys(name, found)
            state, slot = self.store.state_of(name)
            state.steps[slot] = self._saved_state(name, saved, found).steps
            if keys:
                read |= {f"optimizer.{key}.{name}": stored for key, stored in self._stored(name).items()}
        return read

    def end_load(self, saved: dict[str, Any]) -> None:
        """Does nothing, as the tensors were read in place."""


class _TorchState(OptimizerState):
    """The state of a torch optimizer, which holds tensors of its own for each parameter."""

    def __init__(self, session: Session, optimizer: Optimizer) -> None:
        super().__init__(session, optimizer)
        self.loading: dict[str, dict[str, Any]] = {}

    def _tensors(self, name: str) -> dict[str, Stored]:
        values = self.optimizer.state.get(self.parameters[name], {})
        lie = {key: value for key, value in values.items() if _lies_like(self.parameters[name], key, value)}
        return {key: self._stored(name, value) for key, value in lie.items()}

    def _numbers(self, name: str) -> dict[str, Any]:
        values = self.optimizer.state.get(self.parameters[name], {})
        return {key: value for key, value in values.items() if not _lies_like(self.parameters[name], key, value)}

    def _stored(self, name: str, value: Tensor) -> Stored:
        chunks = self.session.store().chunks
        layout, number = chunks.place_of(name)
        slot = layout.slots[number]
        if tuple(value.shape) != slot.shape:
            raise CheckpointError(
                f"the optimizer keeps a tensor of shape {tuple(value.shape)} for {name}, which has shape "
                f"{slot.shape}; only the state of element-wise optimizers can be saved"
            )
        if not value.is_contiguous():
            raise CheckpointError(
                f"the optimizer's state of {name} is not contiguous; only contiguous state can be saved"
            )
        alone = replace(slot, offset=0)
        return Stored.of(value, chunks.local_shards.whole_shape(slot), chunks.local_shards.regions(alone))

    def begin_load(self, saved: dict[str, Any], found: Tensors) -> dict[str, Stored]:
        read: dict[str, Stored] = {}
        for name in self.held:
            self.loading[name] = {key: torch.zeros_like(self.parameters[name]) for key in self._saved_keys(name, found)}
            read |= {f"optimizer.{key}.{name}": self._stored(name, v) for key, v in self.loading[name].items()}
        return read

    def end_load(self, saved: dict[str, Any]) -> None:
        """Hands what was read to the optimizer."""
        states = {name: {**saved["numbers"].get(name, {}), **self.loading[name]} for name in self.held}
        self._load_numbers(saved, states)


def _lies_like(parameter: nn.Parameter, key: str, value: Any) -> bool:
    """Whether a value of an optimizer's state is a tensor laid out as its parameter is, not a number held in a
    tensor."""
    return isinstance(value, Tensor) and (value.ndim > 0 or (parameter.ndim == 0 and key != "step"))
