"""Seconds of an operator on the device: by its FLOP or the bytes that it reads and writes, whichever takes longer.

By default all operands are read and all results written, with bytes by their types. `MOVED` has the operators that
touch other bytes, `SLOWNESS` those that pass through memory more slowly than an addition does. What these and the
shares of products say comes from the times of kernels in steps of Llama-1B x 8, OPT-1.3B x 8, OPT-2.7B x 16 and GPT-2
XL x 4 on H200 machines (`benchmarks/step_time.py --profile`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from ...passes.program.program import UNADMITTED_VIEWS, Program, note, tensor_type, type_of, writes
from ...passes.program.types import TensorType, Type
from ...runtime.isa import instructions as isa
from ...runtime.isa.layout import contiguous_stride
from ...runtime.isa.quantized import DEQUANTIZE
from ..rates.rates import Rates

aten, geminifx = torch.ops.aten, torch.ops.geminifx


def _written(node: fx.Node) -> int:
    if node.op == "call_module" or not writes(node):
        return _num_bytes(type_of(node))
    arguments = zip(node.target._schema.arguments, node.args, strict=False)
    written = [value for argument, value in arguments if argument.alias_info is not None and argument.is_write]
    return sum(_num_bytes(type_of(value)) for value in written if isinstance(value, fx.Node))


def _none(node: fx.Node) -> int:
    return 0


def _gathered(node: fx.Node) -> int:
    """The operator reads only as much of its first operand as it writes."""
    return 2 * _written(node) + sum(_num_bytes(type_of(index)) for index in node.all_input_nodes[1:])


def _put(node: fx.Node) -> int:
    return 2 * _num_bytes(type_of(node.args[2]))


def _put_product(node: fx.Node) -> int:
    left, right = tensor_type(node.args[2]), tensor_type(node.args[3])
    return _num_bytes(left) + _num_bytes(right) + left.shape[0] * right.shape[1] * left.dtype.itemsize


def _put_sum(node: fx.Node) -> int:
    terms = tensor_type(node.args[2])
    return _num_bytes(terms) + prod(isa.summed_shape(terms.shape, node.args[3])) * terms.dtype.itemsize


def _pieces_of_logits(passes: int) -> Callable[[fx.Node], int]:
    """Logits exist only in pieces, but all are written and read: `passes` times in the inputs' dtype, 4 in fp32."""

    def num_bytes(node: fx.Node) -> int:
        matrices = [type for type in map(tensor_type, node.all_input_nodes) if len(type.shape) == 2]
        hidden, weight = matrices[:2]
        logit_bytes = passes * hidden.dtype.itemsize + 4 * torch.float32.itemsize
        return _every_operand(node) + logit_bytes * hidden.shape[0] * weight.shape[0]

    return num_bytes


MOVED: dict[object, Callable[[fx.Node], int]] = {
    isa.GRADIENTS: _none,
    isa.PUT: _put,
    isa.PUT_MM: _put_product,
    isa.PUT_SUM: _put_sum,
    aten.empty.memory_format: _none,
    aten.empty_like.default: _none,
    aten.new_empty.default: _none,
    aten.embedding.default: _gathered,
    aten.index.Tensor: _gathered,
    aten.index_select.default: _gathered,
    aten.gather.default: _gathered,
    aten.nll_loss_forward.default: _gathered,
    aten.nll_loss_backward.default: _written,
    geminifx.linear_cross_entropy.default: _pieces_of_logits(2),
    geminifx.linear_cross_entropy_backward.default: _pieces_of_logits(5),
}
"""Device bytes read and written by operators that do not touch exactly their operands and results."""

FREE = frozenset({
    isa.FETCH, isa.WAIT, isa.VIEW, isa.RELEASE, isa.REDUCE, isa.ACCUMULATE_GRAD, isa.TURN, isa.OFFLOAD, isa.DEPART,
    isa.RELOAD, isa.ARRIVE, isa.START_ALL_GATHER, isa.START_REDUCE_SCATTER, isa.START_ALL_REDUCE,
    isa.FINISH_COLLECTIVE, isa.AVERAGE, isa.BROADCAST, isa.LOCAL, isa.OFFSET, isa.SAVE_RNG, isa.SWAP_RNG, isa.FORK_RNG,
    isa.DRAWN, isa.MICROBATCH, isa.SEND, isa.FINISH_SEND, isa.START_RECEIVE, isa.FINISH_RECEIVE,
    geminifx.absent.default,
})  # fmt: skip
"""Instructions that launch nothing on the device's compute stream; the clock accounts for what they move elsewhere."""


SLOWNESS: dict[object, float] = {
    aten.native_layer_norm.default: 1.9,
    aten.native_layer_norm_backward.default: 3.0,  # two kernels, which both read all
    aten.slice_backward.default: 4.0,  # zeros, and a copy into a part of them
    aten._log_softmax.default: 2.0,
    aten._log_softmax_backward_data.default: 2.0,
    isa.PUT_SUM: 2.0,
    DEQUANTIZE: 9.0,  # several passes, with values in float32 between them
    geminifx.linear_cross_entropy.default: 1.7,
    geminifx.linear_cross_entropy_backward.default: 1.7,
}
"""How many times longer than their bytes at the rate of an addition these operators take."""

SCATTERED, WIDENING = 2.1, 1.45
"""The same for element-wise operators one of whose operands is repeated or in another order than the result, and for
conversions to a wider dtype: torch has no vectorized kernels for them."""

COPIES = frozenset({aten.clone.default, aten._to_copy.default, aten.cat.default})
"""Operators that are not element-wise by torch's tags, for which this holds, too."""

PRODUCT_SHARES: dict[object, float] = {
    geminifx.attention.default: 0.42, geminifx.attention_backward.default: 0.3,
}  # fmt: skip
"""The rate of products in attention, as a share of that of equally large matrix products."""

UNALIGNED_SHARE = 0.45
"""The same for products of 16-bit matrices whose rows do not begin at multiples of 16 bytes, such as GPT-2's logits
over its 50,257 words."""

ALIGNED = 8
"""Elements of 16 bits in 16 bytes."""

IN_PARTS = frozenset({geminifx.linear_cross_entropy.default, geminifx.linear_cross_entropy_backward.default})
"""Operators of several kernels: some multiply, the others read and write the products."""


LAUNCH_WEIGHTS: dict[object, int] = {
    geminifx.attention.default: 5, geminifx.attention_backward.default: 5, isa.REDUCE: 9,
}  # fmt: skip
"""How many times the launching thread's time of a usual operator these take, found by sampling that thread of OPT-1.3B
x 1 on an H200 machine. A `reduce` is taken for one that ends with the chunk's update on the device, as it did there."""


def operators(program: Program) -> Iterator[fx.Node]:
    """The operators that a program calls, in order. Functions are replaced by their bodies, except for fused ones."""
    for node in program.computes:
        if node.op == "call_module" and not program.functions[str(node.target)].is_fused:
            yield from operators(program.functions[str(node.target)])
        else:
            yield node


def is_free(node: fx.Node) -> bool:
    """Whether an operator launches nothing: it is a view, or an instruction without a kernel."""
    return node.op == "call_function" and (node.target in FREE or _is_view(node.target))


def launch_weight(target: object) -> int:
    """How many usual operators take the launching thread as long as this operator does."""
    return LAUNCH_WEIGHTS.get(target, 1)


def kernel_s(node: fx.Node, rates: Rates) -> float:
    """Seconds of an operator on the device once it is launched."""
    products_s = rates.products(product_dtype(node)).seconds(flops(node)) / product_share(node)
    memory_s = weighed_bytes(node) / rates.memory_bytes_per_s
    return rates.kernel_s + (products_s + memory_s if node.target in IN_PARTS else max(products_s, memory_s))


def weighed_bytes(node: fx.Node) -> float:
    """Bytes that an addition reads and writes in the time that this operator takes for its own."""
    slowness = SLOWNESS.get(node.target, 1.0)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in COPIES:
        slowness *= SCATTERED if _is_scattered(node) else WIDENING if _widens(node) else 1.0
    return num_bytes(node) * slowness


def product_share(node: fx.Node) -> float:
    """The rate of an operator's products, as a share of that of equally large aligned matrix products."""
    if node.target in PRODUCT_SHARES:
        return PRODUCT_SHARES[node.target]
    return UNALIGNED_SHARE if flops(node) and _is_unaligned(node) else 1.0


def _is_scattered(node: fx.Node) -> bool:
    """Whether some operand of more than one element is not laid out as the result is."""
    result = type_of(node)
    if not isinstance(result, TensorType):
        return False
    joins = node.target is aten.cat.default  # its operands are parts of the result
    for operand in map(type_of, node.all_input_nodes):
        if isinstance(operand, TensorType) and prod(operand.shape) > 1:
            expected = (operand.shape, contiguous_stride(operand.shape)) if joins else (result.shape, result.stride)
            if _dims(operand.shape, operand.stride) != _dims(*expected):
                return True
    return False


def _dims(shape: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes and strides, without dims of size 1, whose strides mean nothing."""
    return [(size, step) for size, step in zip(shape, stride, strict=True) if size != 1]


def _widens(node: fx.Node) -> bool:
    operands = [type_of(value) for value in node.all_input_nodes]
    narrowest = min((each.dtype.itemsize for each in operands if isinstance(each, TensorType)), default=0)
    result = type_of(node)
    return node.target is aten._to_copy.default and isinstance(result, TensorType) and result.dtype.itemsize > narrowest


def _is_unaligned(node: fx.Node) -> bool:
    matrices = [type for type in map(type_of, (*node.all_input_nodes, node)) if isinstance(type, TensorType)]
    matrices = [type for type in matrices if len(type.shape) > 1 and type.dtype.itemsize == 2]
    if node.target in IN_PARTS:  # the logits have as many columns as the weight has rows
        return any(size % ALIGNED for type in matrices[1:2] for size in type.shape)
    return any(step % ALIGNED for type in matrices for _, step in _dims(type.shape, type.stride) if step > 1)


def num_bytes(node: fx.Node) -> int:
    """Bytes of device memory that an operator reads and writes."""
    return MOVED.get(node.target, _every_operand)(node)


def flops(node: fx.Node) -> int:
    """FLOP of an operator by torch's formulas, from its operands' types; 0 for an operator without a formula."""
    formula = flop_registry.get(getattr(node.target, "_overloadpacket", None))
    if formula is None:
        return 0
    shape = lambda value: _shape(type_of(value))  # noqa: E731
    args, kwargs = fx.map_arg((node.args, node.kwargs), shape)
    return int(formula(*args, **kwargs, out_val=_shape(note(node).type)))


def _every_operand(node: fx.Node) -> int:
    """All operands are read, and all results written; an operand that is written in place counts twice."""
    return sum(_num_bytes(type_of(value)) for value in node.all_input_nodes) + _written(node)


@cache
def _num_bytes(type: Type) -> int:
    """Bytes of the elements; an expanded dimension (stride 0) counts once."""
    if isinstance(type, tuple):
        return sum(map(_num_bytes, type))
    if not isinstance(type, TensorType):
        return 0
    return type.dtype.itemsize * prod(size for size, step in zip(type.shape, type.stride, strict=True) if step)


@cache
def _is_view(target: Callable[..., object]) -> bool:
    """Whether all results of an operator share the storage of its arguments."""
    schema = getattr(target, "_schema", None)
    if schema is None or target in UNADMITTED_VIEWS:  # operator.getitem: an element of a tuple
        return True
    return bool(schema.returns) and not schema.is_mutable and all(result.alias_info for result in schema.returns)


def product_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of the operator's products: that of its first floating-point operand with at least two dimensions."""
    for value in node.all_input_nodes:
        type = type_of(value)
        if isinstance(type, TensorType) and type.dtype.is_floating_point and len(type.shape) > 1:
            return type.dtype
    return torch.float32


def _shape(value: object) -> object:
    """Shapes in the form that torch's formulas take."""
    if isinstance(value, tuple):
        return tuple(map(_shape, value))
    return torch.Size(value.shape) if isinstance(value, TensorType) else value
