"""Fake tensors have the strides of real ones: of every pointwise operator, and of others that a step often holds."""

import copy
import random
from collections.abc import Callable
from functools import partial
from itertools import product

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa.fakes import FaithfulFakeMode
from operators import DTYPES, IMAGES, OTHERS, WHOLE, arguments, pointwise
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def described(result: object) -> list[tuple[object, ...]]:
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tree_leaves(result) if isinstance(t, Tensor)]


def fake_of(call: Callable[..., object], *args: object, **kwargs: object) -> list[tuple[object, ...]]:
    """What `call` makes of fakes of its arguments."""
    with FaithfulFakeMode(), torch.no_grad():
        fake = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if isinstance(t, Tensor) else t  # noqa: E731
        return described(call(*tree_map(fake, args), **tree_map(fake, kwargs)))


@pytest.mark.slow
@pytest.mark.parametrize("op", pointwise(), ids=str)
def test_pointwise_operators_have_the_strides_of_real_tensors(op):
    generator = random.Random(str(op))
    called = 0
    for i in range(60):
        for dtypes in DTYPES:
            args, kwargs = arguments(op, generator, dtypes, whole=i % 3 == 0 or any(w in str(op) for w in WHOLE))
            try:
                real = op(*args, **kwargs)
            except (RuntimeError, TypeError, NotImplementedError, IndexError):
                continue
            called += 1
            strides = [(a.shape, a.stride()) for a in args if isinstance(a, Tensor)]
            assert fake_of(op, *args, **kwargs) == described(real), strides
            break
    assert called > 30


@pytest.mark.parametrize("op", OTHERS, ids=str)
def test_other_operators_have_the_strides_of_real_tensors(op):
    for (a, x), (b, y) in product(IMAGES.items(), repeat=2):
        call = partial(OTHERS[op], op)
        assert fake_of(call, x, y) == described(call(x, y)), (a, b)


# -- steps -------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "softplus": F.softplus, "elu": F.elu, "selu": F.selu, "celu": F.celu, "hardtanh": F.hardtanh, "relu6": F.relu6,
    "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "leaky_relu": F.leaky_relu, "logsigmoid": F.logsigmoid,
    "mish": F.mish, "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "softsign": F.softsign, "tanhshrink": F.tanhshrink,
    "hardshrink": F.hardshrink, "log_softmax": lambda x: F.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, [4]), "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "power": lambda x: 2.0**x,
}  # fmt: skip


class Activation(nn.Module):
    """An activation in front of a transpose or behind one, times a weight: the backward's gradients are transposed."""

    def __init__(self, name: str, before: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.randn(2, 4, 8))
        self.activation, self.before = ACTIVATIONS[name], before

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        if self.before:
            return (self.activation(hidden).transpose(1, 2) * self.weight).sum()
        return (
            self.activation(hidden.transpose(1, 2).contiguous().transpose(1, 2)).transpose(1, 2) * self.weight
        ).sum()


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_at_a_transpose_trains_as_plain_pytorch_does(name, before):
    torch.manual_seed(0)
    model = Activation(name, before)
    x = torch.randn(2, 8, 8, requires_grad=True)
    seen = x.detach().clone().requires_grad_()
    compiled = geminifx.compile(copy.deepcopy(model))
    expected, found = model(x), compiled(seen)
    expected.backward()
    found.backward()
    assert torch.equal(found, expected) and torch.equal(seen.grad, x.grad)
    for name, parameter in model.named_parameters():
        assert torch.equal(compiled.get_parameter(name).grad, parameter.grad), name
