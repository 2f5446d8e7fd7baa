"""Recognise cross-entropies over a vocabulary: product, views, casts, scale, softcap, softmax, loss, gradients.

The pattern is that of any causal or masked language model in a canonical training program. Labels may be shifted in any
way, because the match does not look past the labels that the loss reads; a summed loss is divided only after it. A loss
is found only if nothing else computes with its logits, so that they need not exist.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...runtime.isa.linear_cross_entropy import MEAN, SUM
from ..program.program import Program, tensor_type, type_of
from ..program.types import TensorType

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default)
_SAME_ROWS = (_aten.view.default, _aten._unsafe_view.default, _aten.clone.default, _aten._to_copy.default)


@dataclass(frozen=True)
class Loss:
    """A cross-entropy over logits with which nothing else computes.

    `logits` are the nodes from the last one before the softmax down to `product`. Logits are scaled by `scale`, then
    capped by `softcap * tanh(...)` unless `softcap` is 0. `gradients` maps a position among the results of the fused
    backward (0 hidden states, 1 weight, 2 bias) to the node that computes that gradient now.
    """

    product: fx.Node
    logits: tuple[fx.Node, ...]
    nll: fx.Node
    nll_backward: fx.Node
    scale: float
    softcap: float
    gradients: dict[int, fx.Node]

    @property
    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        *bias, hidden, transposed = self.product.args
        return hidden, transposed.args[0], bias[0] if bias else None


def find_losses(program: Program) -> Iterator[Loss]:
    """Every loss of a canonical training program that can be fused."""
    for nll in program.calls(_aten.nll_loss_forward.default):
        loss = _match(nll)
        if loss is not None:
            yield loss


def _match(nll: fx.Node) -> Loss | None:
    softmax, labels, class_weight, reduction, _ = nll.args
    if softmax.target is not _aten._log_softmax.default or class_weight is not None or reduction not in (MEAN, SUM):
        return None
    backward = {user.target: user for user in softmax.users if user is not nll}
    nll_backward = backward.pop(_aten.nll_loss_backward.default, None)
    softmax_backward = backward.pop(_aten._log_softmax_backward_data.default, None)
    if backward or len(softmax.users) != 3 or nll_backward is None or softmax_backward is None:
        return None
    if list(nll_backward.users) != [softmax_backward] or nll_backward.args[2] is not labels:
        return None
    climbed = _climb(softmax)
    if climbed is None:
        return None
    logits, scale, softcap = climbed
    slope, d_product = _descend(softmax_backward, logits)
    gradients = _gradients(d_product, logits[-1])
    if gradients is None or not math.isclose(slope, scale * (softcap or 1.0), rel_tol=1e-9):
        return None
    return Loss(logits[-1], logits, nll, nll_backward, scale, softcap, gradients)


def _climb(softmax: fx.Node) -> tuple[tuple[fx.Node, ...], float, float] | None:
    """Walks from the softmax up to the product that makes the logits. Returns the logits on the way, scale and
    softcap."""
    reader, node = softmax, softmax.args[0]
    logits: list[fx.Node] = []
    scale, softcap = 1.0, 0.0
    classes = _shape(softmax)[-1]
    if softmax.args[1] not in (1, -1) or len(_shape(softmax)) != 2:
        return None
    while node.op == "call_function" and _shape(node)[-1:] == (classes,) and _only_for(node, reader):
        logits.append(node)
        if node.target in _PRODUCTS:
            return (tuple(logits), scale, softcap) if _is_projection(node) else None
        if node.target is _aten.tanh.default and not softcap:
            scale, softcap = 1.0, scale  # the factors after the tanh are the cap
        elif node.target not in _SAME_ROWS:
            scale *= _factor(node)
        if not math.isfinite(scale) or not scale:
            return None
        reader, node = node, node.args[0]
    return None


def _shape(node: fx.Node) -> tuple[int, ...]:
    type = type_of(node)
    return type.shape if isinstance(type, TensorType) else ()


def _only_for(node: fx.Node, reader: fx.Node) -> bool:
    """Whether nothing but `reader`, and the derivative of a tanh, computes with a value; it may be an output."""
    return all(
        user is reader or user.op == "output" or (node.target is _aten.tanh.default and _is_derivative(user, node))
        for user in node.users
    )


def _is_derivative(user: fx.Node, tanh: fx.Node) -> bool:
    return user.target is _aten.tanh_backward.default and user.args[1] is tanh


def _is_projection(product: fx.Node) -> bool:
    """Whether a product is hidden @ weight.T, perhaps plus a bias, with more classes than features."""
    transposed = product.args[-1]
    if product.kwargs or transposed.target is not _aten.t.default:
        return False
    vocabulary, size = _shape(transposed.args[0])
    if len({tensor_type(node).dtype for node in (*product.args, product)}) > 1:
        return False
    return vocabulary > size and all(_shape(bias) == (vocabulary,) for bias in product.args[:-2])


def _factor(node: fx.Node) -> float:
    """The constant that a node multiplies its first argument by; NaN for other nodes."""
    constant = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if isinstance(constant, int | float) and constant:
        if node.target is _aten.mul.Tensor:
            return float(constant)
        if node.target is _aten.div.Tensor:
            return 1.0 / constant
    return math.nan


def _descend(node: fx.Node, logits: tuple[fx.Node, ...]) -> tuple[float, fx.Node]:
    """Walks from the gradient of the softmax's argument down to the product's. Returns the scale on the way and that
    gradient."""
    slope = 1.0
    while len(node.users) == 1:
        (user,) = node.users
        derivative = user.target is _aten.tanh_backward.default and user.args[1] in logits
        factor = 1.0 if user.target in _SAME_ROWS or derivative else _factor(user)
        if user.op != "call_function" or user.args[0] is not node or math.isnan(factor):
            break
        slope, node = slope * factor, user
    return slope, node


def _gradients(d_product: fx.Node, product: fx.Node) -> dict[int, fx.Node] | None:
    """The nodes that compute the gradients of hidden states (0), weight (1) and bias (2) from the product's gradient.
    None if anything else reads it."""
    *bias, hidden, transposed = product.args
    found: dict[int, fx.Node] = {}
    for user in d_product.users:
        place, node = 0, user
        if user.target is _aten.t.default and len(user.users) == 1:
            place, (node,) = 1, user.users
            expected = (_aten.mm.default, (user, hidden))
        elif user.target is _aten.sum.dim_IntList and user.args[1] == [0] and len(user.users) == 1 and bias:
            place, (node,) = 2, user.users
            expected = (_aten.view.default, (user, list(_shape(bias[0]))))
        else:
            expected = (_aten.mm.default, (d_product, transposed.args[0]))
        if (node.target, node.args) != expected or place in found:
            return None
        found[place] = node
    return found or None
