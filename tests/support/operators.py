"""Operators of ATen with arguments of every kind: what fakes and plans tell of their results is compared with these."""

import random
from collections.abc import Callable
from functools import cache

import torch
from geminifx.runtime.isa.fakes import LAYOUTS
from torch import Tensor

aten = torch.ops.aten


NOT_IN_PROGRAMS = {
    aten.clip.Tensor,  # clamp, in a program
    aten.equal.default,  # has no tensor for a result
    aten.ldexp.Tensor,  # a product and a power, in a program
    aten.rrelu.default,  # rrelu_with_noise, in a program
}
WHOLE = ("loss", "entropy", "prelu", "log_sigmoid_backward")
"""Of these operators' arguments autograd makes one shape first."""


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


OTHERS: dict[torch._ops.OpOverload, Callable[..., object]] = {
    aten._native_batch_norm_legit_functional.default: lambda op, x, y: op(
        x, ones(3), ones(3), ones(3), ones(3), True, 0.1, 1e-5
    ),
    aten._native_batch_norm_legit_no_training.default: lambda op, x, y: op(
        x, ones(3), ones(3), ones(3), ones(3), 0.1, 1e-5
    ),
    aten.native_batch_norm.default: lambda op, x, y: op(x, ones(3), ones(3), ones(3), ones(3), True, 0.1, 1e-5),
    aten.native_batch_norm_backward.default: lambda op, x, y: op(
        y, x, ones(3), ones(3), ones(3), ones(3), ones(3), True, 1e-5, [True, True, True]
    ),
    aten.native_group_norm.default: lambda op, x, y: op(x.contiguous(), ones(3), ones(3), 2, 3, 20, 1, 1e-5),
    aten.native_group_norm_backward.default: lambda op, x, y: op(
        y.contiguous(), x.contiguous(), ones(2, 1), ones(2, 1), ones(3), 2, 3, 20, 1, [True, True, False]
    ),
    aten.native_layer_norm.default: lambda op, x, y: op(x, [5], ones(5), ones(5), 1e-5),
    aten.native_layer_norm_backward.default: lambda op, x, y: op(
        y, x, [5], ones(2, 3, 4, 1), ones(2, 3, 4, 1), ones(5), ones(5), [True, False, True]
    ),
    aten._log_softmax.default: lambda op, x, y: op(x, 1, False),
    aten._log_softmax_backward_data.default: lambda op, x, y: op(y, x, 1, torch.float32),
    aten._softmax.default: lambda op, x, y: op(x, 1, False),
    aten._softmax_backward_data.default: lambda op, x, y: op(y, x, 1, torch.float32),
    aten.bmm.default: lambda op, x, y: op(x[0], y[0].transpose(1, 2)),
    aten.cat.default: lambda op, x, y: op([x, y], 1),
    aten.clone.default: lambda op, x, y: op(x),
    aten.constant_pad_nd.default: lambda op, x, y: op(x, [1, 1]),
    aten.convolution.default: lambda op, x, y: op(x, ones(4, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    aten.cumsum.default: lambda op, x, y: op(x, 1),
    aten.gather.default: lambda op, x, y: op(x, 1, (y > 0.5).long()),
    aten.glu.default: lambda op, x, y: op(x, 2),
    aten.glu_backward.default: lambda op, x, y: op(y, torch.cat([x, x], 1), 1),
    aten.masked_fill.Scalar: lambda op, x, y: op(x, y > 0.5, 1.0),
    aten.mean.dim: lambda op, x, y: op(x, [1], True),
    aten.nll_loss2d_forward.default: lambda op, x, y: op(x, (y[:, 0] > 0.5).long(), None, 0, -100),
    aten.reflection_pad2d_backward.default: lambda op, x, y: op(y, x[..., :3, :3], [1, 1, 1, 0]),
    aten.replication_pad2d_backward.default: lambda op, x, y: op(y, x[..., :3, :3], [1, 1, 1, 0]),
    aten.roll.default: lambda op, x, y: op(x, [1], [1]),
    aten.stack.default: lambda op, x, y: op([x, y]),
    aten.sum.dim_IntList: lambda op, x, y: op(x, [1]),
    aten.upsample_nearest2d.default: lambda op, x, y: op(x, [8, 10]),
    aten.var_mean.correction: lambda op, x, y: op(x, [1]),
    aten.where.self: lambda op, x, y: op(x > 0.5, x, y),
}
"""Operators that are not pointwise, or take arguments of their own, as functions of two tensors."""


def pointwise() -> list[torch._ops.OpOverload]:
    """The pointwise operators that write nothing, and those that are so in all but their tag."""
    packets = (getattr(aten, name) for name in dir(aten) if name != "name")
    every = [getattr(p, o) for p in packets if isinstance(p, torch._ops.OpOverloadPacket) for o in p.overloads()]
    tagged = {op for op in every if torch.Tag.pointwise in op.tags and not op._schema.is_mutable}
    return sorted((tagged | set(LAYOUTS)) - set(OTHERS) - NOT_IN_PROGRAMS, key=str)


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
SCALARS = {"number": 0.5, "float": 0.5, "int": 1, "str": "none", "List[bool]": [True, True, True]}
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
            value = generator.random() < 0.5 if kind == "bool" else value
            value = int(value) if kind == "number" and not dtypes[0].is_floating_point else value
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


IMAGES = {
    "contiguous": values(2, 3, 4, 5),
    "channels last": values(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": values(2, 3, 5, 4).transpose(2, 3),
    "batch and channels exchanged": values(3, 2, 4, 5).transpose(0, 1),
    "reversed": values(5, 4, 3, 2).permute(3, 2, 1, 0),
    "expanded": values(2, 3, 1, 5).expand(2, 3, 4, 5),
    "sliced": values(2, 3, 4, 10)[..., ::2],
}
