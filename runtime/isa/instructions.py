"""The instruction set: the only interface between the passes and the machine that runs their programs.

Passes emit these operators into a graph; `runtime.machine` implements each under the same name. Nothing else is shared.
Every effect is in the schema (`Tensor(a!)`), so that dead-code elimination keeps operators that write and deletes those
without effect. Fake kernels give result types, so that the type checker treats an instruction like any other operator.

A chunk's life in a program::

    c3 = geminifx.fetch(3, 4096, torch.float32)    # the copy to the device starts
    w3 = geminifx.wait(c3, 3)                      # the copy has arrived
    w = geminifx.view(w3, 128, [32, 64])           # one parameter of the chunk
    ...
    geminifx.release(w3, 3)                        # the chunk is no longer read

and that of its gradients::

    g3 = geminifx.gradients(4096, torch.float32)
    geminifx.put(g3, 128, dw)                      # one parameter's gradient is complete
    geminifx.put_mm(g3, 2176, dy, x)               # another's is this matrix product, computed in place
    geminifx.put_sum(g3, 2432, dy, [0])            # or this sum
    geminifx.reduce(g3, 3, [0, 1])                 # the transfer to the chunk's master starts
    geminifx.accumulate_grad(g3, 3, [0, 1])        # and is done: accumulated beside the master

An activation is offloaded to the host until its backward::

    host = geminifx.offload(x)                     # the copy to the host starts
    geminifx.depart(x, host)                       # the copy is done: the memory of `x` is free
    back = geminifx.reload(host)                   # the copy to the device starts
    x = geminifx.arrive(back, host)                # the copy has arrived; `host` is free

With several ranks `reduce` also sums gradients over the replicas, losses are averaged, and buffers are the first
rank's::

    n = geminifx.average(count)                    # the mean over the ranks
    b = geminifx.broadcast(b)                      # the first rank's
    mine = geminifx.share(loss, count, n)          # this rank's term of the mean over all tokens

A sharded program communicates along the axes of the mesh::

    whole = geminifx.all_gather(x, 1, "col", 2)    # `x` is sharded along dimension 1 over the 2 ranks of axis col
    x = geminifx.reduce_scatter(p, 1, "col", 2)    # this rank's shard of the sum of partial tensors
    y = geminifx.all_reduce(p, "row", "sum")       # the whole sum
    x = geminifx.local(whole, 1, "col", 2)         # this rank's shard of a replicated tensor
    first = geminifx.offset(x, "col", 16)          # where this rank's shard of length 16 starts

A program that splits its batch reads one microbatch at a time::

    x1 = geminifx.microbatch(x, 1, 4)              # the second of four equal parts of the batch
    geminifx.drawn(rng, y)                         # y was drawn only to advance the generator from the state rng

Pipeline ranks, numbered along the pipeline axis, exchange activations and gradients. Messages between two ranks arrive
in the order in which they were sent::

    geminifx.send(h, 1)                            # to rank 1, asynchronously; `h` must not be written
    geminifx.finish_send(h, 1)                     # it was sent: the memory of `h` is free
    h = geminifx.receive([2, 4], [4, 1], torch.float32, 0)   # from rank 0, in this shape

The machine does not implement `receive`: `post_receives` replaces it by a start and a wait::

    p = geminifx.start_receive([2, 4], [4, 1], torch.float32, 0)
    h = geminifx.finish_receive(p)                 # the same tensor

Random operators on sharded tensors draw different numbers on each shard's rank::

    rng = geminifx.fork_rng(x, ["row", "col"])     # a generator state that differs by coordinate on these axes
    geminifx.swap_rng(rng)                         # the generator takes this state; `rng` keeps the previous one
    y = aten.native_dropout.default(x, 0.1, True)
    geminifx.swap_rng(rng)                         # all ranks' generators are in the same state again

The machine does not implement `all_gather`, `reduce_scatter` and `all_reduce` either: `overlap` replaces each by an
asynchronous collective, along the first dimension of a contiguous tensor, and a wait. In between the result must not be
read, nor `x` written::

    p = geminifx.start_all_gather(x, "col", 2)
    whole = geminifx.finish_collective(p, x)       # the same tensor; `x` lives until here
    p = geminifx.start_reduce_scatter(x, "col", 2)
    mine = geminifx.finish_collective(p, x)
    p = geminifx.start_all_reduce(x, "row", "sum") # overwrites `x`
    y = geminifx.finish_collective(p)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .layout import parameter_view

NAMESPACE = "geminifx"

SCHEMAS = {
    "fetch": "(int chunk, int numel, ScalarType dtype) -> Tensor",
    "wait": "(Tensor(a) fetched, int chunk) -> Tensor(a)",
    "view": "(Tensor(a) weights, int offset, int[] shape) -> Tensor(a)",
    "release": "(Tensor(a!) weights, int chunk) -> ()",
    "gradients": "(int numel, ScalarType dtype) -> Tensor",
    "put": "(Tensor(a!) gradients, int offset, Tensor gradient) -> ()",
    "put_mm": "(Tensor(a!) gradients, int offset, Tensor left, Tensor right) -> ()",
    "put_sum": "(Tensor(a!) gradients, int offset, Tensor terms, int[] dims) -> ()",
    "reduce": "(Tensor(a!) gradients, int chunk, int[] slots) -> ()",
    "accumulate_grad": "(Tensor(a!) gradients, int chunk, int[] slots) -> ()",
    "offload": "(Tensor value) -> Tensor",
    "depart": "(Tensor value, Tensor(a!) host) -> ()",
    "reload": "(Tensor host) -> Tensor",
    "arrive": "(Tensor(a) reloaded, Tensor host) -> Tensor(a)",
    "turn": "(Tensor(a!)[] outputs, int[] differentiable) -> Tensor[]",
    "average": "(Tensor value) -> Tensor",
    "broadcast": "(Tensor value) -> Tensor",
    "share": "(Tensor loss, Tensor count, Tensor average) -> Tensor",
    "microbatch": "(Tensor(a) batch, int index, int count) -> Tensor(a)",
    "send": "(Tensor(a!) value, int to) -> ()",
    "finish_send": "(Tensor(a!) value, int to) -> ()",
    "receive": "(int[] shape, int[] stride, ScalarType dtype, int source) -> Tensor",
    "start_receive": "(int[] shape, int[] stride, ScalarType dtype, int source) -> Tensor",
    "finish_receive": "(Tensor(a) coming) -> Tensor(a)",
    "all_gather": "(Tensor shard, int dim, str axis, int size) -> Tensor",
    "reduce_scatter": "(Tensor partial, int dim, str axis, int size) -> Tensor",
    "all_reduce": "(Tensor partial, str axis, str reduction) -> Tensor",
    "start_all_gather": "(Tensor shard, str axis, int size) -> Tensor",
    "start_reduce_scatter": "(Tensor partial, str axis, int size) -> Tensor",
    "start_all_reduce": "(Tensor(a!) partial, str axis, str reduction) -> Tensor(a!)",
    "finish_collective": "(Tensor(a) pending, Tensor? shard=None) -> Tensor(a)",
    "local": "(Tensor whole, int dim, str axis, int size) -> Tensor",
    "offset": "(Tensor like, str axis, int extent) -> Tensor",
    "drawn": "(Tensor(a!) state, Tensor value) -> ()",
    "save_rng": "(Tensor like) -> Tensor",
    "swap_rng": "(Tensor(a!) state) -> ()",
    "fork_rng": "(Tensor like, str[] axes) -> Tensor",
}
RANDOM = frozenset({"fork_rng"})
"""Instructions that draw random numbers: two calls with the same arguments have different results."""

CPU_RNG_STATE_BYTES = torch.Generator().get_state().numel()


def _flat(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype)


def microbatch(batch: Tensor, index: int, count: int) -> Tensor:
    """One of `count` equal parts of a batch along its first dimension. Raises ValueError if there is no such part."""
    examples, rest = divmod(batch.shape[0], count)
    if rest or not 0 <= index < count:
        raise ValueError(f"a batch of shape {list(batch.shape)} has no microbatch {index} of {count}")
    return batch.narrow(0, index * examples, examples)


def _put_product(gradients: Tensor, offset: int, left: Tensor, right: Tensor) -> None:
    torch.mm(left, right, out=parameter_view(gradients, offset, (left.shape[0], right.shape[1])))


def summed_shape(shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    """The shape of a sum over `dims`, counted from 0, of a tensor of this shape."""
    return [size for dim, size in enumerate(shape) if dim not in dims]


def _put_sum(gradients: Tensor, offset: int, terms: Tensor, dims: Sequence[int]) -> None:
    torch.sum(terms, dims, out=parameter_view(gradients, offset, summed_shape(terms.shape, dims)))


def _alike(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    return tensor.new_empty([*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]])


def _local(tensor: Tensor, dim: int, axis: str, size: int) -> Tensor:
    if tensor.shape[dim] % size:
        raise ValueError(f"dimension {dim} of {list(tensor.shape)} is not divisible by the {size} ranks of axis {axis}")
    return _resized(tensor, dim, tensor.shape[dim] // size)


def _received(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype)


def _no_result(*_: object) -> None:
    return None


FAKES: dict[str, Callable[..., object]] = {
    "fetch": lambda chunk, numel, dtype: _flat(numel, dtype),
    "wait": lambda fetched, chunk: fetched.view(fetched.shape),
    "view": parameter_view,
    "release": _no_result,
    "gradients": _flat,
    "put": _no_result,
    "put_mm": _put_product,
    "put_sum": _put_sum,
    "reduce": _no_result,
    "accumulate_grad": _no_result,
    "offload": _alike,
    "depart": _no_result,
    "reload": _alike,
    "arrive": lambda reloaded, host: reloaded.view(reloaded.shape),
    "turn": lambda outputs, differentiable: [torch.empty_like(outputs[i]) for i in differentiable],
    "average": torch.empty_like,
    "broadcast": torch.empty_like,
    "share": lambda loss, count, average: torch.empty_like(loss),
    "microbatch": microbatch,
    "send": _no_result,
    "finish_send": _no_result,
    "receive": _received,
    "start_receive": _received,
    "finish_receive": lambda coming: coming.view(coming.shape),
    "all_gather": lambda shard, dim, axis, size: _resized(shard, dim, shard.shape[dim] * size),
    "reduce_scatter": _local,
    "all_reduce": lambda partial, axis, reduction: torch.empty_like(partial, memory_format=torch.contiguous_format),
    "start_all_gather": lambda shard, axis, size: _resized(shard, 0, shard.shape[0] * size),
    "start_reduce_scatter": lambda partial, axis, size: _local(partial, 0, axis, size),
    "start_all_reduce": lambda partial, axis, reduction: partial.view(partial.shape),
    "finish_collective": lambda pending, shard=None: pending.view(pending.shape),
    "local": _local,
    "offset": lambda like, axis, extent: torch.empty((), dtype=torch.int64),
    "drawn": _no_result,
    "save_rng": lambda like: torch.empty(CPU_RNG_STATE_BYTES, dtype=torch.uint8),
    "swap_rng": _no_result,
    "fork_rng": lambda like, axes: torch.empty(CPU_RNG_STATE_BYTES, dtype=torch.uint8),
}

for _name, _schema in SCHEMAS.items():
    _tags = (torch.Tag.nondeterministic_seeded,) if _name in RANDOM else ()
    torch.library.define(f"{NAMESPACE}::{_name}", _schema, tags=_tags)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", FAKES[_name])

_ops = torch.ops.geminifx
FETCH = _ops.fetch.default
WAIT = _ops.wait.default
VIEW = _ops.view.default
RELEASE = _ops.release.default
GRADIENTS = _ops.gradients.default
PUT = _ops.put.default
PUT_MM = _ops.put_mm.default
PUT_SUM = _ops.put_sum.default
REDUCE = _ops.reduce.default
ACCUMULATE_GRAD = _ops.accumulate_grad.default
OFFLOAD = _ops.offload.default
DEPART = _ops.depart.default
RELOAD = _ops.reload.default
ARRIVE = _ops.arrive.default
TURN = _ops.turn.default
AVERAGE = _ops.average.default
BROADCAST = _ops.broadcast.default
SHARE = _ops.share.default
MICROBATCH = _ops.microbatch.default
SEND = _ops.send.default
FINISH_SEND = _ops.finish_send.default
RECEIVE = _ops.receive.default
START_RECEIVE = _ops.start_receive.default
FINISH_RECEIVE = _ops.finish_receive.default
ALL_GATHER = _ops.all_gather.default
REDUCE_SCATTER = _ops.reduce_scatter.default
ALL_REDUCE = _ops.all_reduce.default
START_ALL_GATHER = _ops.start_all_gather.default
START_REDUCE_SCATTER = _ops.start_reduce_scatter.default
START_ALL_REDUCE = _ops.start_all_reduce.default
FINISH_COLLECTIVE = _ops.finish_collective.default
LOCAL = _ops.local.default
OFFSET = _ops.offset.default
DRAWN = _ops.drawn.default
SAVE_RNG = _ops.save_rng.default
SWAP_RNG = _ops.swap_rng.default
FORK_RNG = _ops.fork_rng.default

COLLECTIVES = frozenset({ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE})
"""What the pass `shard` emits and `overlap` replaces."""

INSTRUCTIONS = frozenset(SCHEMAS) - {"turn", "receive", *(op._schema.name.split("::")[1] for op in COLLECTIVES)}
"""The names that a machine implements. A `turn` becomes Python's `yield`; receives and the `COLLECTIVES` are
replaced."""

PUTS = frozenset({PUT, PUT_MM, PUT_SUM})

CHUNK_NUMBER = {FETCH: 0, WAIT: 1, RELEASE: 1, REDUCE: 1, ACCUMULATE_GRAD: 1}
"""The position of the chunk's number among an instruction's arguments."""

STARTS = frozenset({START_ALL_GATHER, START_REDUCE_SCATTER, START_ALL_REDUCE})

PER_CHUNK = frozenset({FETCH, WAIT, RELEASE, REDUCE, ACCUMULATE_GRAD})
"""Instructions that name a chunk: programs of identical layers differ only in these."""

PLACED = PER_CHUNK | {DEPART, RELOAD, SEND, FINISH_SEND, RECEIVE, START_RECEIVE, FINISH_RECEIVE}
"""Instructions that are placed wherever the plan finds time for copies, rather than by the module they belong to."""


@register_flop_formula(torch.ops.geminifx.put_mm)
def _put_mm_flops(gradients: object, offset: int, left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]
