"""`geminifx.save_checkpoint` and `load_checkpoint`: a run's state, written by all processes and read by any number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..runtime.distributed.local_shards import Region
from ..runtime.isa.errors import CheckpointError, check_path
from ..runtime.memory.stored import Stored
from ..runtime.state_io.sharded import load, save, stored_shapes, write
from .arguments import check_compiled, check_optimizer
from .capture.materialize import materialize
from .module import CompiledModule
from .optimizer_state import OptimizerState
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
        ArgumentError: the model is not compiled, or the optimizer not of its parameters.
        CheckpointError: it cannot be written; a checkpoint that was there is intact.
        StateError: the model has no values yet.
    """
    _check(model, optimizer, directory)
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
        state = OptimizerState.of(session, optimizer)
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
        ArgumentError: the model is not compiled, or the optimizer not of its parameters.
        CheckpointError: there is none, or it is of another model or optimizer; then nothing is changed. Where it
            cannot be read to its end, some values are.
        StateError: there is no plan yet.
    """
    _check(model, optimizer, directory)
    session, ranks = model.session, model.session.ranks
    shapes = stored_shapes(directory)
    objects = load(directory, {}, ("extra", "optimizer"), ranks)
    state = None if optimizer is None else OptimizerState.of(session, optimizer)
    if state is not None:
        state.check(objects.get("optimizer"), shapes)
    _give_values(session)
    tensors = _model_tensors(session, writing=False)
    _check_shapes(tensors, shapes)
    if state is not None:
        tensors |= state.begin_load(objects["optimizer"], shapes)
    load(directory, tensors, (), ranks)
    session.store().masters_written()
    if state is not None:
        state.end_load(objects["optimizer"])
    return objects.get("extra")


def _check(model: Any, optimizer: Any, directory: Any) -> None:
    check_compiled(model)
    check_optimizer(model, optimizer)
    check_path("directory", directory, "the path of a directory")


def _give_values(session: Session) -> None:
    """Memory for values that are on `meta`."""
    session.demanded()
    source = session.source
    if any(tensor.is_meta for tensor in (*source.parameters(), *source.buffers())):
        materialize(source, source.state_dict())
    session.ready(backward=False)


def _model_tensors(session: Session, writing: bool) -> dict[str, Stored]:
    """Masters and the buffers that a state_dict holds; of these, which all have, rank 0 alone writes."""
    store = session.store()
    store.finish()
    found = {f"model.{name}": store.stored_master(name) for name in store.chunks.layout.places}
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
