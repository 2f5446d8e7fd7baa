"""`geminifx.save_checkpoint` and `load_checkpoint`: a run's state, saved by all processes and loaded by any number."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..runtime.distributed.local_shards import Region
from ..runtime.isa.errors import CheckpointError, check_path
from ..runtime.isa.precision import is_exact
from ..runtime.memory.stored import Stored
from ..runtime.state_io.background import Saving
from ..runtime.state_io.sharded import Contents, Saved, save
from .arguments import check_compiled, check_optimizer
from .capture.materialize import check_loadable, materialize
from .module import CompiledModule
from .session import Session
from .state.optimizer_state import OptimizerState, Tensors


def save_checkpoint(model: CompiledModule, optimizer: Optimizer | None, directory: str | Path,
                    extra: Any = None, *, background: bool = False) -> Saving:  # fmt: skip
    """Save masters, buffers and the optimizer's state, exactly; each process writes its own shards.

    All processes call it, on a file system that they share. The result is a torch.distributed.checkpoint checkpoint,
    which `load_checkpoint` reads in any number of processes, sharded in any way, with model.optimizer(...) or the torch
    optimizer of the same kind. It is for resuming a run; `model.save_pretrained` writes weights for other programs.

    Args:
        optimizer: an optimizer that `model.optimizer(...)` returned, or a torch optimizer over the model's parameters;
            None saves the model alone.
        directory: replaced as a whole, in one step, when the new checkpoint is complete, with its files' checksums.
        extra: further values to keep, such as the step: numbers, strings, tensors, and lists and dicts of them. Rank
            0's are saved.
        background: return once everything is copied to the host, whose budget must have room for it, and let a thread
            write while training continues. The next save, a load and the end of the process wait for it.

    Returns:
        The save, already finished unless it is in the background; its `result()` waits for the end.

    Raises:
        ArgumentError: the model is not compiled, or the optimizer not over its parameters.
        CheckpointError: the checkpoint cannot be written; one that was there is intact. Or the previous save, in the
            background, failed, and `result()` was not called to report it.
        StateError: the model has no values yet.
    """
    _check(model, optimizer, directory)
    saves = model.session.saves
    saves.finish()
    contents = checkpoint_contents(model, optimizer, extra)
    if background:
        return saves.start(partial(save, directory, contents, saves.ranks), model.session.planned_host_bytes())
    save(directory, contents, model.ranks)
    return Saving.finished()


def checkpoint_contents(model: CompiledModule, optimizer: Optimizer | None, extra: Any) -> Contents:
    """The contents that `save_checkpoint` writes: the state in place, without copies."""
    session = model.session
    session.ready(backward=False)
    tensors, objects = _model_tensors(session, writing=True), {"extra": extra}
    if optimizer is not None:
        state = OptimizerState.of(session, optimizer)
        tensors |= state.tensors()
        objects["optimizer"] = state.numbers()
    return Contents(tensors, objects)


def load_checkpoint(model: CompiledModule, optimizer: Optimizer | None, directory: str | Path) -> Any:
    """Resume from a checkpoint of `save_checkpoint`; weights on `meta` get memory. Returns the `extra` that was saved.

    All processes call it. The optimizer must be of the same kind as when it was saved, and its groups of the same
    parameters. All files are read through before anything is changed.

    Raises:
        ArgumentError: the model is not compiled, or the optimizer not over its parameters.
        CheckpointError: there is no checkpoint, it is damaged, or it is of another model or optimizer; or a save in the
            background failed and has not been reported. Nothing is changed then. If reading fails even after these
            checks, the model refuses all further steps until another load succeeds.
        StateError: there is no plan yet.
    """
    _check(model, optimizer, directory)
    opened = open_checkpoint(model, directory)
    opened.load(optimizer)
    return opened.extra


def open_checkpoint(model: CompiledModule, directory: str | Path) -> "OpenCheckpoint":
    """A checkpoint for `model`, checked to be intact, of which nothing is loaded yet. All processes call it.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or a save in the background failed without a report.
    """
    model.session.saves.finish()
    saved = Saved.found(directory, model.ranks)
    return OpenCheckpoint(model, saved, saved.read({}, ("extra", "optimizer")))


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint that `open_checkpoint` opened; `objects` are its contents other than tensors."""

    model: CompiledModule
    saved: Saved
    objects: dict[str, Any]

    @property
    def extra(self) -> Any:
        return self.objects.get("extra")

    def load(self, optimizer: Optimizer | None) -> None:
        """Restore model and optimizer. All processes call it; for errors see `load_checkpoint`."""
        session, found = self.model.session, self.saved.tensors
        state = None if optimizer is None else OptimizerState.of(session, optimizer)
        if state is not None:
            state.check(self.objects.get("optimizer"), found)
        _check_tensors(_expected(session), found)
        _give_values(session)
        tensors = _model_tensors(session, writing=False)
        parts = {"model"} if state is None else {"model", "optimizer"}
        with session.half_loaded.while_written(*parts):
            if state is not None:
                tensors |= state.begin_load(self.objects["optimizer"], found)
            self.saved.read(tensors)
            session.store().masters_written()
            if state is not None:
                state.end_load(self.objects["optimizer"])


def _check(model: Any, optimizer: Any, directory: Any) -> None:
    check_compiled(model)
    check_optimizer(model, optimizer)
    check_path("directory", directory, "the path of a directory")


def _give_values(session: Session) -> None:
    """Allocates memory for values on `meta`, to be read into, and places the training states. A pending load is
    dropped, unless this fails."""
    places = session.places
    incoming, places.incoming = places.incoming, None
    try:
        source = session.source
        if any(tensor.is_meta for tensor in (*source.parameters(), *source.buffers())):
            check_loadable(source, source.state_dict())
            session.half_loaded.add("model")
            materialize(source, partial(session.take_places, are_alike=True))
        session.settle(backward=False)
    except BaseException:
        places.incoming = incoming
        raise


def _expected(session: Session) -> Tensors:
    """The shapes and dtypes of the tensors that `_model_tensors` returns, known also before there are values."""
    chunks, kept = session.store().chunks, session.source.state_dict().keys()
    found = {}
    for name in session.names().values():
        found[f"model.{name}"] = chunks.whole_shape(name), chunks.dtype_of(name)
    buffers = {name: buffer for name, buffer in session.source.named_buffers() if name in kept}
    return found | {f"model.{name}": (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()}


def _model_tensors(session: Session, writing: bool) -> dict[str, Stored]:
    """The masters, and the buffers that a state_dict holds. All ranks hold the buffers, so only rank 0 writes them."""
    store = session.store()
    store.finish()
    found = {f"model.{name}": store.stored_master(name) for name in session.names().values()}
    kept = session.source.state_dict().keys()
    for name, buffer in session.source.named_buffers():
        if name in kept:
            everywhere = _everywhere(buffer)
            regions = () if writing and session.ranks.rank else (everywhere,)
            found[f"model.{name}"] = Stored.of(buffer, everywhere.sizes, regions)
    return found


def _everywhere(tensor: Tensor) -> Region:
    return Region((0,) * tensor.ndim, tuple(tensor.shape), 0, tensor.stride())


def _check_tensors(expected: Tensors, found: Tensors) -> None:
    """Raises CheckpointError if the checkpoint is of another model, or holds values that a dtype cannot take
    exactly."""
    for name, (own_shape, own_dtype) in expected.items():
        if 0 in own_shape:
            continue
        if name not in found:
            raise CheckpointError(f"nothing was loaded: {name} has shape {own_shape}, but the checkpoint lacks it")
        shape, dtype = found[name]
        if shape != own_shape:
            raise CheckpointError(
                f"nothing was loaded: {name} has shape {own_shape}, but shape {shape} in the checkpoint"
            )
        if not is_exact(dtype, own_dtype):
            raise CheckpointError(
                f"nothing was loaded: {name} is {own_dtype}, but {dtype} in the checkpoint, which {own_dtype} cannot "
                "represent exactly; compile the model with the same options as when it was saved"
            )
    others = [name for name in found if name.startswith("model.") and name not in expected]
    if others:
        raise CheckpointError(
            f"nothing was loaded: the checkpoint has {', '.join(others[:3])}{', ...' * (len(others) > 3)}, which the "
            "model lacks; it belongs to another model"
        )
