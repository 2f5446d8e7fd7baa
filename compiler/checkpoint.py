"""`geminifx.save_checkpoint` and `load_checkpoint`: a run's state, written by all processes and read by any number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..runtime.distributed.local_shards import Region
from ..runtime.isa.errors import CheckpointError, StateError
from ..runtime.optimizer.chunk_optimizer import MOMENTS, ChunkOptimizer
from ..runtime.optimizer.updating_machine import UpdatingMachine
from ..runtime.state_io.sharded import Stored, load, save, stored_shapes, write
from ..runtime.state_io.training_state import master, moments, settle
from .capture.materialize import materialize
from .module import CompiledModule
from .session import Session


def save_checkpoint(model: CompiledModule, optimizer: Optimizer | None, directory: str | Path,
                    extra: Any = None) -> None:  # fmt: skip
    """Save masters, buffers and the optimizer's state, exactly; each process writes its own parts.

    All processes call it, on a file system that they share. What comes out is a checkpoint of
    torch.distributed.checkpoint that `load_checkpoint` reads in any number of processes, sharded in any way, with
    model.optimizer(...) or the torch optimizer of the same kind. It is for going on; `model.save_pretrained` makes
    what other programs read.

    Args:
        optimizer: what `model.optimizer(...)` returned, or a torch optimizer over the model's parameters; None: only
            the model is saved.
        directory: replaced as a whole when the new checkpoint is complete.
        extra: what else to keep, such as the step: numbers, strings, tensors, and lists and dicts of them. Rank 0's
            is saved.

    Raises:
        CheckpointError: it cannot be written; a checkpoint that was there is intact.
        StateError: the model has no values yet.
    """
    save(directory, *_contents(model, optimizer, extra), model.ranks)


def write_checkpoint(model: CompiledModule, optimizer: Optimizer | None, directory: Path, extra: Any = None) -> None:
    """What `save_checkpoint` saves, into a directory of one that is replaced as a whole, by `sharded.replacing`."""
    write(directory, *_contents(model, optimizer, extra), model.ranks)


def _contents(
    model: CompiledModule, optimizer: Optimizer | None, extra: Any
) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors and objects of a checkpoint."""
    session = model.session
    session.ready(backward=False)
    tensors, objects = _model_tensors(session, writing=True), {"extra": extra}
    if optimizer is not None:
        state = _OptimizerState(session, optimizer)
        tensors |= state.tensors()
        objects["optimizer"] = state.numbers()
    return tensors, objects


def read_extra(model: CompiledModule, directory: str | Path) -> Any:
    """The `extra` of a checkpoint, alone: nothing is loaded. All processes call it.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """
    return load(directory, {}, ("extra",), model.ranks).get("extra")


def load_checkpoint(model: CompiledModule, optimizer: Optimizer | None, directory: str | Path) -> Any:
    """Go on from what `save_checkpoint` saved; weights on `meta` come to life. Returns the `extra` that was saved.

    All processes call it. The optimizer's groups must be of the parameters of which they were when it was saved.

    Raises:
        CheckpointError: there is none, or it is of another model or optimizer; then nothing is changed. Where it
            cannot be read to its end, some values are.
        StateError: there is no plan yet.
    """
    session, ranks = model.session, model.session.ranks
    shapes = stored_shapes(directory)
    objects = load(directory, {}, ("extra", "optimizer"), ranks)
    state = None if optimizer is None else _OptimizerState(session, optimizer)
    if state is not None:
        state.check(objects.get("optimizer"), shapes)
    _give_values(session)
    tensors = _model_tensors(session, writing=False)
    _check_shapes(tensors, shapes)
    if state is not None:
        tensors |= state.begin_load(objects["optimizer"], shapes)
    load(directory, tensors, (), ranks)
    if isinstance(session.machine, UpdatingMachine):
        settle(session.machine)
    if state is not None:
        state.end_load(objects["optimizer"])
    return objects.get("extra")


def _give_values(session: Session) -> None:
    """Memory for values that are on `meta`."""
    if session.plan is None:
        raise StateError("there is no plan yet: pass example_inputs= to compile, or call the module once")
    source = session.source
    if any(tensor.is_meta for tensor in (*source.parameters(), *source.buffers())):
        materialize(source, source.state_dict())
    session.ready(backward=False)


def _model_tensors(session: Session, writing: bool) -> dict[str, Stored]:
    """Masters and the buffers that a state_dict holds; of these, which all have, rank 0 alone writes."""
    machine = session.machine
    assert machine is not None
    if isinstance(machine, UpdatingMachine):
        machine.finish()
    found = {f"model.{name}": master(machine, name) for name in machine.placing.store.layout.places}
    kept = session.source.state_dict().keys()
    for name, buffer in session.source.named_buffers():
        if name in kept:
            everywhere = _everywhere(buffer)
            regions = () if writing and session.ranks.rank else (everywhere,)
            found[f"model.{name}"] = Stored.of(buffer, everywhere.sizes, regions)
    return found


def _everywhere(tensor: Tensor) -> Region:
    return Region((0,) * tensor.ndim, tuple(tensor.shape), 0, tensor.stride())


def _check_shapes(tensors: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, stored in tensors.items():
        found = shapes.get(name)
        if found != stored.shape and 0 not in stored.shape:
            what = "lacks it" if found is None else f"has shape {found}"
            raise CheckpointError(f"nothing was loaded: {name} has shape {stored.shape}, the checkpoint {what}")


class _OptimizerState:
    """An optimizer's state by its parameters' names: tensors, which lie as the parameters do, and numbers."""

    def __init__(self, session: Session, optimizer: Optimizer) -> None:
        self.session = session
        self.optimizer = optimizer
        self.names = session.names()
        self.parameters = {self.names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
        self.loading: dict[str, dict[str, Any]] = {}

    # -- saving --------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Stored]:
        return {
            f"optimizer.{key}.{name}": stored for name in self.parameters for key, stored in self._tensors(name).items()
        }

    def numbers(self) -> dict[str, Any]:
        """Everything else, with names for parameters."""
        own = self.optimizer
        groups = [{**group, "params": [self.names[id(p)] for p in group["params"]]} for group in own.param_groups]
        numbers = {name: found for name in self.parameters if (found := self._numbers(name))}
        return {"param_groups": groups, "numbers": numbers, **(own.scaling() if self._is_ours else {})}

    def _tensors(self, name: str) -> dict[str, Stored]:
        if self._is_ours:
            state, slot = self._machine.state_of(name)
            return dict(zip(self._moments, moments(self._machine, name), strict=False)) if state.steps[slot] else {}
        values = self.optimizer.state.get(self.parameters[name], {})
        lie = {key: value for key, value in values.items() if _lies_like(self.parameters[name], key, value)}
        return {key: self._stored(name, value) for key, value in lie.items()}

    def _numbers(self, name: str) -> dict[str, Any]:
        if self._is_ours:
            state, slot = self._machine.state_of(name)
            return (
                {"step": torch.tensor(float(state.steps[slot]))} if state.steps[slot] and len(self._moments) > 1 else {}
            )
        values = self.optimizer.state.get(self.parameters[name], {})
        return {key: value for key, value in values.items() if not _lies_like(self.parameters[name], key, value)}

    def _stored(self, name: str, value: Tensor) -> Stored:
        """A tensor of a torch optimizer, which has its own for each parameter."""
        store = self.session.machine.placing.store  # type: ignore[union-attr]
        layout, number = store.layout.places[name]
        slot = layout.slots[number]
        if tuple(value.shape) != slot.shape:
            raise CheckpointError(
                f"the optimizer keeps a tensor of shape {tuple(value.shape)} for {name}, which has {slot.shape}; only "
                "the state of element-wise optimizers can be saved"
            )
        if not value.is_contiguous():
            raise CheckpointError(f"the optimizer's state of {name} is not contiguous; only contiguous state is saved")
        moved = type(slot)(name, 0, slot.shape, slot.placement)
        return Stored.of(value, store.parts.whole_shape(slot), store.parts.regions(moved))

    # -- loading -------------------------------------------------------------------------------------------

    def check(self, saved: Any, shapes: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the checkpoint is of another optimizer."""
        if saved is None:
            raise CheckpointError("the checkpoint holds no optimizer's state; load it with optimizer=None")
        before = [set(group["params"]) for group in saved["param_groups"]]
        now = [{self.names[id(p)] for p in group["params"]} for group in self.optimizer.param_groups]
        if before != now:
            raise CheckpointError(
                f"the optimizer has {len(now)} group(s) of {', '.join(str(len(g)) for g in now)} parameters, in the "
                f"checkpoint {len(before)} of {', '.join(str(len(g)) for g in before)}, or others in them; make the "
                "same groups"
            )
        if self._is_ours:
            kinds = {key for name in self.parameters for key in self._saved_keys(name, shapes)}
            if kinds and not set(self._moments) <= kinds:
                raise CheckpointError(
                    f"the checkpoint has {', '.join(sorted(kinds))} of the optimizer, expected "
                    f"{', '.join(self._moments)}; it is of another optimizer"
                )

    def begin_load(self, saved: dict[str, Any], shapes: Mapping[str, Any]) -> dict[str, Stored]:
        """Take over groups and numbers; returns what is to be read into."""
        if self._is_ours:
            self._load_numbers(saved, {})
        found: dict[str, Stored] = {}
        for name, parameter in self.parameters.items():
            keys = self._saved_keys(name, shapes)
            if self._is_ours:
                own = dict(zip(self._moments, moments(self._machine, name), strict=False)) if keys else {}
                state, slot = self._machine.state_of(name)
                state.steps[slot] = int(saved["numbers"].get(name, {}).get("step", 1 if keys else 0))
            else:
                self.loading[name] = {key: torch.zeros_like(parameter) for key in keys}
                own = {key: self._stored(name, value) for key, value in self.loading[name].items()}
            found |= {f"optimizer.{key}.{name}": stored for key, stored in own.items()}
        return found

    def end_load(self, saved: dict[str, Any]) -> None:
        """A torch optimizer takes over what was read."""
        if not self._is_ours:
            states = {name: {**saved["numbers"].get(name, {}), **self.loading[name]} for name in self.parameters}
            self._load_numbers(saved, states)

    def _load_numbers(self, saved: dict[str, Any], states: dict[str, dict[str, Any]]) -> None:
        order = {name: i for i, name in enumerate(self.parameters)}
        groups = [
            {**group, "params": [order[self.names[id(p)]] for p in own["params"]]}
            for group, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        by_number = {order[name]: state for name, state in states.items() if state}
        scale = {key: saved[key] for key in ("loss_scale",) if key in saved}
        self.optimizer.load_state_dict({"state": by_number, "param_groups": groups, **scale})

    def _saved_keys(self, name: str, shapes: Mapping[str, Any]) -> list[str]:
        return [key for key in self._keys(shapes) if f"optimizer.{key}.{name}" in shapes]

    @staticmethod
    def _keys(shapes: Mapping[str, Any]) -> list[str]:
        """What the optimizer keeps for parameters, of all that a checkpoint has."""
        return sorted({name.split(".")[1] for name in shapes if name.startswith("optimizer.")})

    # -- kinds ---------------------------------------------------------------------------------------------

    @property
    def _is_ours(self) -> bool:
        return isinstance(self.optimizer, ChunkOptimizer)

    @property
    def _machine(self) -> UpdatingMachine:
        assert isinstance(self.session.machine, UpdatingMachine)
        return self.session.machine

    @property
    def _moments(self) -> tuple[str, ...]:
        assert isinstance(self.optimizer, ChunkOptimizer)
        return MOMENTS[self.optimizer.declared.kind]


def _lies_like(parameter: nn.Parameter, key: str, value: Any) -> bool:
    """Whether an optimizer's state is a tensor that lies as the parameter does, and not a number in a tensor."""
    return isinstance(value, Tensor) and (value.ndim > 0 or (parameter.ndim == 0 and key != "step"))
