"""The values of a model: its parameters and buffers, and the inputs of a call."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.errors import StateError
from ...runtime.isa.precision import cast_dtype
from ...runtime.memory.chunks import ChunkStore
from ..capture.materialize import replace_buffers
from ..programs.members import Census
from ..programs.programs import Compiled


def move_buffers(source: nn.Module, device: torch.device) -> None:
    replace_buffers(source, lambda buffer: buffer.to(device))


def share_values(source: nn.Module, ranks: Ranks, device: torch.device, chunks: ChunkStore) -> None:
    """Gives every rank the values of rank 0. If ranks have freed the parameters of other pipeline stages, it takes
    parameters from the first rank with the same layers instead."""
    for name, parameter in source.named_parameters():
        if not chunks.has_let_go:
            ranks.from_first_(parameter.detach(), device)
        elif name not in chunks.elsewhere:
            ranks.from_first_alike_(parameter.detach())
    for buffer in source.buffers():
        ranks.from_first_(buffer.detach(), device)


def program_inputs(
    census: Census, compiled: Compiled, arguments: Any, device: torch.device, dtype: torch.dtype | None
) -> list[Any]:
    """A program's inputs by role. Tensors of the call go to the device, in the compute dtype; numbers stay as they are.

    Raises StateError for a tensor that has no values, or that the program would overwrite.
    """
    leaves, buffers = pytree.tree_leaves(arguments), census.now().buffers
    written = {buffers[name].untyped_storage()._cdata: name for name in compiled.written}
    inputs = []
    for role in compiled.executor.code.inputs:
        kind, _, name = role.partition(":")
        if kind == "buffer":
            inputs.append(buffers[name])
        elif kind == "constant":
            inputs.append(compiled.captured.program.constants[name].to(device))
        elif kind == "number":
            inputs.append(leaves[int(name)])
        elif kind == "expected":
            scale = compiled.executor.machine.store.loss_scale
            largest = 2.0 ** math.floor(math.log2(torch.finfo(compiled.expected).max))  # a power of two, exact as ratio
            inputs.append(torch.full((), min(scale, largest), dtype=compiled.expected, device=device))
        else:
            leaf = leaves[int(name)]
            _check_input(leaf, written, device)
            inputs.append(on_device(leaf, device, dtype))
    return inputs


def _check_input(tensor: Tensor, written: Mapping[int, str], device: torch.device) -> None:
    """Raises StateError if the program cannot take this input. `written` maps the memory of buffers that it writes to
    their names."""
    if tensor.is_meta:
        raise StateError(
            f"an input of shape {tuple(tensor.shape)} is on 'meta', which has no values; pass a tensor on "
            f"the CPU or on {device}"
        )
    buffer = written.get(tensor.untyped_storage()._cdata) if written else None
    if buffer is not None:
        raise StateError(
            f"an input of shape {tuple(tensor.shape)} shares the memory of the buffer {buffer}, which the forward "
            "writes to, so it would not see the new values; pass a copy, .clone(), or read the buffer in the forward"
        )


def on_device(tensor: Tensor, device: torch.device, compute_dtype: torch.dtype | None) -> Tensor:
    """An input on the device where programs run, in the dtype they take.

    Copies from page-locked memory are asynchronous, and the caller may refill it as soon as the call returns. The host
    therefore waits for such a copy, on a stream of its own so as not to wait for computation.
    """
    dtype = cast_dtype(tensor, compute_dtype)
    if device.type != "cuda" or tensor.device.type != "cpu" or not tensor.is_pinned():
        return tensor.to(device, dtype, non_blocking=True)
    current, beside = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(beside):
        moved = tensor.to(device, dtype, non_blocking=True)
    current.wait_stream(beside)
    moved.record_stream(current)
    beside.synchronize()
    return moved


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def check_parameters(now: Mapping[str, nn.Parameter], compiled: Mapping[str, nn.Parameter]) -> None:
    """Checks that the model has the parameters it was compiled with, which are those in the chunks, and no others.

    Raises StateError for one that was added, removed or replaced.
    """
    if now.keys() != compiled.keys() or any(now[n] is not p for n, p in compiled.items()):
        changed = next((n for n in {**now, **compiled} if now.get(n) is not compiled.get(n)), "")
        raise StateError(
            f"parameter {changed} was added, removed or replaced after the model was compiled; compile the changed "
            "model again, or assign values with load_state_dict() or parameter.data.copy_()"
        )
