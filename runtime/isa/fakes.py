"""Fake tensors with the strides of real kernels' results.

torch's fake kernels give correct shapes and dtypes. But some are written in Python in terms of other operators, and
have the strides of their results: elu's backward is torch.where of a condition, a product and the gradient, whereas the
kernel goes by the gradient's strides first. Traced on such strides, a program takes views that real tensors do not
allow, and copies where plain PyTorch takes views.

This module holds the strides of those operators' kernels. All follow one of three rules: contiguous; contiguous or
channels last, like an argument; or as pointwise kernels do, by the strides of their operands, in order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .torch_private import FakeTensorMode, suggest_memory_format, unmetered

_aten = torch.ops.aten
_Rule = Callable[[Tensor, Mapping[str, Any]], tuple[int, ...]]
"""The strides of a result, given its fake and the operator's arguments by name."""


class FaithfulFakeMode(FakeTensorMode):
    """Makes fake tensors with the strides of real ones."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().dispatch(func, types, args, kwargs)
        rule = LAYOUTS.get(func)
        if rule is None or (func in OF_CPUS and torch.cuda.is_available()):
            return result
        named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        if isinstance(result, tuple):
            return tuple(self._laid_out(fake, rule, named) for fake in result)
        return self._laid_out(result, rule, named)

    def _laid_out(self, fake: Any, rule: _Rule, arguments: Mapping[str, Any]) -> Any:
        if fake is None:  # a result that was not asked for
            return None
        stride = rule(fake, arguments)
        if stride == fake.stride():
            return fake
        with self:
            return torch.empty_strided(fake.shape, stride, dtype=fake.dtype, device=fake.device)


def _contiguous(fake: Tensor, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    return torch.empty(fake.shape, device="meta").stride()


def _channels_last_as(name: str) -> _Rule:
    """Contiguous, or channels last if the argument of this name is."""

    def rule(fake: Tensor, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        if fake.dim() != arguments[name].dim():  # statistics and weights
            return _contiguous(fake, arguments)
        memory_format = suggest_memory_format(arguments[name])
        return torch.empty(fake.shape, device="meta", memory_format=memory_format).stride()

    return rule


def _like(*names: str) -> _Rule:
    """The strides that pointwise kernels give a result whose operands are the arguments of these names, in this order.

    They are taken from the fakes of pointwise operators with one, two or three operands, which are correct.
    """

    def rule(fake: Tensor, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        operands = [arguments[name] for name in names if isinstance(arguments[name], Tensor)]  # not a number
        pointwise: Callable[..., Tensor] = (torch.neg, torch.add, torch.addcmul)[len(operands) - 1]
        with unmetered():
            like = pointwise(*(torch.empty_strided(t.shape, t.stride(), device="meta") for t in operands))
        return like.stride() if like.shape == fake.shape else fake.stride()  # a mean keeps its own

    return rule


def _clamp(fake: Tensor, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    return _like("self", *(name for name in ("min", "max") if arguments.get(name) is not None))(fake, arguments)


def _rrelu_backward(fake: Tensor, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    return _like("noise" if arguments["training"] else "self", "grad_output")(fake, arguments)


LAYOUTS: Mapping[Any, _Rule] = {
    # Pointwise operators and their backwards.
    _aten._prelu_kernel_backward.default: _like("self", "weight", "grad_output"),
    _aten.binary_cross_entropy.default: _like("self"),
    _aten.binary_cross_entropy_backward.default: _like("self"),
    _aten.clamp.Tensor: _clamp,
    _aten.complex.default: _like("real", "imag"),
    _aten.copysign.Tensor: _like("self", "other"),
    _aten.div.Tensor_mode: _like("self", "other"),
    _aten.elu_backward.default: _like("grad_output", "self_or_result"),
    _aten.floor_divide.default: _like("self", "other"),
    _aten.hardsigmoid_backward.default: _like("grad_output", "self"),
    _aten.hardswish_backward.default: _like("grad_output", "self"),
    _aten.hardtanh_backward.default: _like("grad_output", "self"),
    _aten.heaviside.default: _like("self", "values"),
    _aten.huber_loss.default: _like("self"),
    _aten.leaky_relu_backward.default: _like("self", "grad_output"),
    _aten.log_sigmoid_backward.default: _like("grad_output"),
    _aten.logaddexp.default: _like("self", "other"),
    _aten.logaddexp2.default: _like("self", "other"),
    _aten.logical_and.default: _like("self", "other"),
    _aten.logical_or.default: _like("self", "other"),
    _aten.logical_xor.default: _like("self", "other"),
    _aten.logit_backward.default: _like("grad_output", "self"),
    _aten.native_dropout_backward.default: _like("grad_output", "mask"),
    _aten.polar.default: _like("abs", "angle"),
    _aten.rrelu_with_noise_backward.default: _rrelu_backward,
    _aten.soft_margin_loss_backward.default: _like("target"),
    _aten.softplus_backward.default: _like("grad_output", "self"),
    _aten.special_xlog1py.default: _like("self", "other"),
    _aten.threshold_backward.default: _like("self", "grad_output"),
    _aten.xlogy.Tensor: _like("self", "other"),
    # Always contiguous.
    _aten._log_softmax_backward_data.default: _contiguous,
    _aten._standard_gamma.default: _contiguous,
    _aten.glu_backward.default: _contiguous,
    _aten.huber_loss_backward.default: _contiguous,
    _aten.isin.Tensor_Scalar: _contiguous,
    _aten.isin.Tensor_Tensor: _contiguous,
    _aten.log_sigmoid_forward.default: _contiguous,
    _aten.mse_loss_backward.default: _contiguous,
    _aten.native_layer_norm_backward.default: _contiguous,
    _aten.nll_loss2d_forward.default: _contiguous,
    _aten.normal.Tensor_Tensor: _contiguous,
    _aten.normal.Tensor_float: _contiguous,
    _aten.normal.float_Tensor: _contiguous,
    _aten.poisson.default: _contiguous,
    _aten.pow.Scalar: _contiguous,
    _aten.smooth_l1_loss_backward.default: _contiguous,
    # Contiguous or channels last.
    _aten._native_batch_norm_legit_functional.default: _channels_last_as("input"),
    _aten._native_batch_norm_legit_no_training.default: _channels_last_as("input"),
    _aten.native_batch_norm.default: _channels_last_as("input"),
    _aten.native_batch_norm_backward.default: _channels_last_as("input"),
    _aten.native_group_norm_backward.default: _channels_last_as("input"),
    _aten.reflection_pad2d_backward.default: _channels_last_as("self"),
    _aten.replication_pad2d_backward.default: _channels_last_as("self"),
    _aten.roll.default: _channels_last_as("self"),
}
"""By operator, the rule for the strides of all its results, where torch's fake kernel differs from the real one."""

OF_CPUS = frozenset({
    _aten._native_batch_norm_legit_functional.default,
    _aten._native_batch_norm_legit_no_training.default,
    _aten.log_sigmoid_forward.default,
    _aten.native_batch_norm.default,
    _aten.native_batch_norm_backward.default,
    _aten.native_dropout_backward.default,
    _aten.native_group_norm_backward.default,
    _aten.reflection_pad2d_backward.default,
    _aten.replication_pad2d_backward.default,
    _aten.roll.default,
})  # fmt: skip
"""Operators with different kernels on GPUs, whose strides were not examined: there torch's fakes are trusted."""
