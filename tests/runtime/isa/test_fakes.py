"""Fake tensors have the strides of real ones: of every pointwise operator, and of others that a step often holds."""

import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa.fakes import LAYOUTS, FaithfulFakeMode
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten


def pointwise() -> list[torch._ops.OpOverload]:
    """The pointwise operators that write nothing, and those that are so in all but their tag."""
    packets = (getattr(aten, name) for name in dir(aten) if name != "name")
    every = [getattr(p, o) for p in packets if isinstance(p, torch._ops.OpOverloadPacket) for o in p.overloads()]
    tagged = {op for op in every if torch.Tag.pointwise in op.tags and not op._schema.is_mutable}
    return sorted(tagged | set(LAYOUTS) - {aten.native_layer_norm_backward.default}, key=str)


def values(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.8 + 0.1  # between 0 and 1, where every operator is defined


def layouts() -> dict[str, Tensor]:
    """Tensors of one shape in different layouts, and some that are broadcast to it."""
    return {
        "contiguous": values(3, 4, 5),
        "last two transposed": values(3, 5, 4).transpose(1, 2),
        "first two transposed": values(4, 3, 5).transpose(0, 1),
        "reversed": values(5, 4, 3).permute(2, 1, 0),
        "rotated": values(4, 5, 3).permute(2, 0, 1),
        "expanded first": values(1, 4, 5).expand(3, 4, 5),
        "expanded middle": values(3, 1, 5).expand(3, 4, 5),
        "expanded last": values(3, 4, 1).expand(3, 4, 5),
        "sliced": values(3, 4, 10)[:, :, ::2],
        "sliced and transposed": values(3, 10, 8).transpose(1, 2)[:, ::2, ::2],
        "broadcast row": values(5),
        "broadcast matrix": values(5, 4).t(),
        "scalar": values(1)[0],
    }


BROADCAST = ("broadcast row", "broadcast matrix", "scalar")
SCALARS = {"number": 0.5, "float": 0.5, "int": 1, "bool": False, "str": "none", "List[bool]": [True, True, True]}
DTYPES = ((torch.float32, torch.float32), (torch.float32, torch.bool), (torch.int64, torch.bool))
"""Of what an operator computes with, and of its masks and conditions: the first that it takes."""
NAMED = {"reduction": 0, "scale": 2.0, "min": 0.25, "max": 0.75}
"""What some arguments are given, where no other value asks for the operator's own kernel."""


@cache
def drawn() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return layouts()


def arguments(op: torch._ops.OpOverload, generator: random.Random, dtypes: tuple[torch.dtype, torch.dtype],
              whole: bool) -> tuple[list, dict]:  # fmt: skip
    """Arguments for all that has no default; `whole` leaves out what is broadcast."""
    kinds, args, kwargs = [k for k in drawn() if not (whole and k in BROADCAST)], [], {}
    for argument in op._schema.arguments:
        kind = str(argument.type)
        is_asked = not argument.has_default_value() or argument.name in NAMED
        if not is_asked and not argument.kwarg_only and not kwargs:
            args.append(argument.default_value)
            continue
        if not is_asked:
            continue
        if "Tensor" in kind:
            tensor = drawn()[generator.choice(kinds)]
            value = tensor.to(dtypes[argument.name in ("mask", "condition")])
        else:
            value = NAMED.get(argument.name, SCALARS.get(kind))
            value = int(value) if kind == "number" and not dtypes[0].is_floating_point else value
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def described(result: object) -> list[tuple[object, ...]]:
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tree_leaves(result) if isinstance(t, Tensor)]


def fake_of(call: Callable[..., object], *args: object, **kwargs: object) -> list[tuple[object, ...]]:
    """What `call` makes of fakes of its arguments."""
    with FaithfulFakeMode(), torch.no_grad():
        fake = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if isinstance(t, Tensor) else t  # noqa: E731
        return described(call(*tree_map(fake, args), **tree_map(fake, kwargs)))


NOT_CALLED = {
    "aten.clamp.default", "aten.clip.default"}  # fmt: skip


@pytest.mark.parametrize("op", pointwise(), ids=str)
def test_pointwise_operators_have_the_strides_of_real_tensors(op):
    generator = random.Random(str(op))
    called = 0
    for i in range(60):
        for dtypes in DTYPES:
            args, kwargs = arguments(op, generator, dtypes, whole=i % 3 == 0 or "loss" in str(op))
            try:
                real = op(*args, **kwargs)
            except (RuntimeError, TypeError, NotImplementedError, IndexError):
                continue
            called += 1
            strides = [(a.shape, a.stride()) for a in args if isinstance(a, Tensor)]
            assert fake_of(op, *args, **kwargs) == described(real), strides
            break
    assert called > 30
