"""Programs of one operator, and a table of calls: one or more for every operator that has a rule for sharding."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from geminifx.passes.program.program import Program, type_of
from geminifx.passes.program.types import TensorType
from torch import Tensor, fx
from torch.utils._pytree import tree_map

aten, ours = torch.ops.aten, torch.ops.geminifx


@dataclass(frozen=True)
class OneCall:
    """An operator's arguments, tensors among them. `values`: whether the results do not depend on chance; `fixed` are
    numbers of arguments that are parameters or indices, of which no sum is left to be taken."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    values: bool = True
    fixed: frozenset[int] = frozenset()

    def tensors(self) -> list[Tensor]:
        """Every tensor once, as the arguments of a node are."""
        found: list[Tensor] = []
        tree_map(lambda a: found.append(a) if isinstance(a, Tensor) and all(a is not f for f in found) else None,
                 (self.args, self.kwargs))  # fmt: skip
        return found

    def given(self) -> list[Tensor]:
        """Every tensor as often as it is given."""
        found: list[Tensor] = []
        tree_map(lambda a: found.append(a) if isinstance(a, Tensor) else None, (self.args, self.kwargs))
        return found

    def results(self) -> list[Tensor | None]:
        torch.manual_seed(0)
        made = self.target(*self.args, **self.kwargs)
        return list(made) if isinstance(made, tuple | list) else [made]

    def program(self) -> tuple[Program, fx.Node]:
        """The call alone in a program that returns all of its results, and its node."""
        program, tensors = Program("before"), self.tensors()
        nodes = [program.add_input(f"x{i}", TensorType.of(t), f"input:{i}") for i, t in enumerate(tensors)]
        program.set_results({})
        place = lambda t: next(i for i, other in enumerate(tensors) if other is t)  # noqa: E731
        args, kwargs = tree_map(lambda a: nodes[place(a)] if isinstance(a, Tensor) else a, (self.args, self.kwargs))
        node = program.emit(self.target, args, kwargs, before=program.output)
        types = type_of(node)
        made = [(0, node)]
        if isinstance(types, tuple):
            present = [i for i, type in enumerate(types) if type is not None]
            made = [(i, program.emit(operator.getitem, (node, i), before=program.output)) for i in present]
        program.set_results({f"output:{i}": result for i, result in made})
        return program, node


def _rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_GENERATOR)


def _ints(*shape: int, below: int = 8) -> Tensor:
    return torch.randint(0, below, shape, generator=_GENERATOR)


_GENERATOR = torch.Generator().manual_seed(0)


def _elementwise() -> list[OneCall]:
    a, b, row, column, number = _rand(4, 8), _rand(4, 8), _rand(8), _rand(4, 1), _rand()
    two = [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor]
    calls = [OneCall(f"{op}", op, (a, b)) for op in two]
    calls += [OneCall(f"{op}, one twice", op, (a, a)) for op in two]
    calls += [OneCall(f"{op}, a row", op, (a, row)) for op in two]
    calls += [OneCall(f"{op}, of a column", op, (column, b)) for op in two]
    calls += [OneCall(f"{op}, a scalar", op, (a, number)) for op in two]
    calls += [OneCall(f"{op}, a number", op, (a, 3.0)) for op in two]
    one = [aten.neg.default, aten.clone.default, aten.zeros_like.default, aten.ones_like.default, aten.relu.default,
           aten.exp.default]  # fmt: skip
    calls += [OneCall(f"{op}", op, (a,)) for op in one]
    return [
        *calls,
        OneCall("add with a factor", aten.add.Tensor, (a, b), {"alpha": 2}),
        OneCall("mul.Scalar", aten.mul.Scalar, (a, 3.0)),
        OneCall("div.Scalar", aten.div.Scalar, (a, 3.0)),
        OneCall("to another float", aten._to_copy.default, (a,), {"dtype": torch.float32}),
        OneCall("to integers", aten._to_copy.default, (10 * a,), {"dtype": torch.int64}),
        OneCall("full_like", aten.full_like.default, (a, 3.0)),
        OneCall("rand_like", aten.rand_like.default, (a,), values=False),
        OneCall("bernoulli", aten.bernoulli.p, (a, 0.5), values=False),
        OneCall("dropout of nothing", aten.native_dropout.default, (a, 0.0, True)),
        OneCall("dropout", aten.native_dropout.default, (a, 0.5, True), values=False),
        OneCall("masked_fill", aten.masked_fill.Tensor, (a, row > 0, number)),
        OneCall("masked_fill by number", aten.masked_fill.Scalar, (a, column > 0, 3.0)),
        OneCall("where", aten.where.self, (column > 0, a, row)),
        OneCall("power", aten.pow.Tensor_Scalar, (a, 2)),
    ]


def _shapes() -> list[OneCall]:
    a, matrix, ones = _rand(4, 4, 8), _rand(4, 8), _rand(4, 1, 8)
    views = [((4, 4, 8), (16, 8)), ((16, 8), (4, 4, 8)), ((4, 4, 8), (4, 4, 4, 2)), ((4, 4, 4, 2), (4, 4, 8)),
             ((4, 8), (4, 1, 8)), ((4, 1, 8), (32,)), ((4, 8), (8, 4))]  # fmt: skip
    made = [OneCall(f"{op} {s} {t}", op, (_rand(*s), list(t))) for s, t in views
            for op in (aten.view.default, aten._unsafe_view.default, aten.reshape.default)]  # fmt: skip
    return [
        *made,
        OneCall("t", aten.t.default, (matrix,)),
        OneCall("view of a transposed", aten.reshape.default, (matrix.t(), [32])),
        OneCall("transpose", aten.transpose.int, (a, 1, -1)),
        OneCall("permute", aten.permute.default, (a, [2, 0, -2])),
        OneCall("expand", aten.expand.default, (ones, [4, 4, 8])),
        OneCall("expand, a new one", aten.expand.default, (matrix, [2, -1, 8])),
        OneCall("unsqueeze", aten.unsqueeze.default, (matrix, 1)),
        OneCall("unsqueeze last", aten.unsqueeze.default, (matrix, -1)),
        OneCall("squeeze", aten.squeeze.dim, (ones, 1)),
        OneCall("squeeze of more than one", aten.squeeze.dim, (ones, 0)),
        OneCall("squeeze some", aten.squeeze.dims, (ones, [0, 1])),
        OneCall("squeeze all", aten.squeeze.default, (ones,)),
        OneCall("select", aten.select.int, (a, 1, 2)),
        OneCall("select backward", aten.select_backward.default, (_rand(4, 8), [4, 4, 8], 1, 2)),
        OneCall("slice", aten.slice.Tensor, (a, 1, 1, 3)),
        OneCall("slice of all", aten.slice.Tensor, (a, 1, 0, 9223372036854775807)),
        OneCall("slice backward", aten.slice_backward.default, (_rand(4, 2, 8), [4, 4, 8], 1, 1, 3, 1)),
        OneCall("slice backward of all", aten.slice_backward.default, (a, [4, 4, 8], 1, 0, 9223372036854775807, 1)),
        OneCall("pad", aten.constant_pad_nd.default, (a, [1, 1], 5.0)),
        OneCall("pad two", aten.constant_pad_nd.default, (a, [0, 0, 2, 0])),
        OneCall("split in two", aten.split.Tensor, (a, 4, -1)),
        OneCall("split in first", aten.split.Tensor, (a, 1)),
        OneCall("split unevenly", aten.split.Tensor, (_rand(4, 12), 8, 1)),
        OneCall("split by sizes", aten.split_with_sizes.default, (a, [4, 4], 2)),
        OneCall("split by other sizes", aten.split_with_sizes.default, (_rand(4, 12), [8, 4], 1)),
        OneCall("cat", aten.cat.default, ([a, _rand(4, 4, 8)], 1)),
        OneCall("cat of others", aten.cat.default, ([a, _rand(4, 4, 4)], -1)),
        OneCall("cat, one twice", aten.cat.default, ([matrix, matrix], 1)),
    ]


def _sums() -> list[OneCall]:
    a, b, soft = _rand(4, 4, 8), _rand(4, 8, 4), torch.softmax(_rand(4, 4, 8), 1)
    return [
        OneCall("sum", aten.sum.default, (a,)),
        OneCall("sum of last", aten.sum.dim_IntList, (a, [-1], True)),
        OneCall("sum of two", aten.sum.dim_IntList, (a, [0, 1])),
        OneCall("sum of none", aten.sum.dim_IntList, (a, None)),
        OneCall("mean", aten.mean.default, (a,)),
        OneCall("mean of middle", aten.mean.dim, (a, [1])),
        OneCall("mean of two", aten.mean.dim, (a, [0, -1], True)),
        OneCall("amax", aten.amax.default, (a, [1])),
        OneCall("amax of all", aten.amax.default, (a,)),
        OneCall("cumsum", aten.cumsum.default, (a, 1)),
        OneCall("softmax", aten._softmax.default, (a, -1, False)),
        OneCall("softmax backward", aten._softmax_backward_data.default, (a, soft, 1, torch.float64)),
        OneCall("log softmax", aten._log_softmax.default, (_rand(8, 8), -1, False)),
        OneCall("log softmax of three", aten._log_softmax.default, (a, 1, False)),
        OneCall("log softmax backward", aten._log_softmax_backward_data.default,
                (_rand(8, 8), torch.log_softmax(_rand(8, 8), 1), 1, torch.float64), fixed=frozenset({1})),
        OneCall("mm", aten.mm.default, (_rand(4, 8), _rand(8, 8))),
        OneCall("mm, one twice", aten.mm.default, (square := _rand(8, 8), square)),
        OneCall("bmm", aten.bmm.default, (a, b)),
        OneCall("addmm", aten.addmm.default, (_rand(8), _rand(4, 8), _rand(8, 8)), fixed=frozenset({0, 2})),
    ]  # fmt: skip


def _attentions() -> list[OneCall]:
    q, k, v, mask = _rand(4, 4, 4, 8), _rand(4, 4, 4, 8), _rand(4, 4, 4, 8), _ints(4, 4, below=2) > 0
    grouped = (_rand(4, 8, 4, 8), k, v)
    calls = []
    for name, heads, masked in (("", (q, k, v), None), (" masked", (q, k, v), mask), (" grouped", grouped, None)):
        out, lse, rng = ours.attention(*heads, masked, 0.5, masked is None, 0.0, 0)
        known = (*heads, masked, out, lse, rng, 0.5, masked is None, 0.0, 0)
        calls.append(OneCall(f"attention{name}", ours.attention.default, (*heads, masked, 0.5, masked is None, 0.0, 0)))
        calls.append(OneCall(f"attention backward{name}", ours.attention_backward.default, (_rand(*out.shape), *known)))
    return [*calls, OneCall("attention, one thrice", ours.attention.default, (q, q, q, None, 0.5, True, 0.0, 0))]


def _layers() -> list[OneCall]:
    x, g, w, b, ids = _rand(4, 4, 8), _rand(4, 4, 8), _rand(8), _rand(8), _ints(4, 4)
    _, mean, rstd = aten.native_layer_norm(x, [8], w, b, 1e-5)
    image, kernel = _rand(4, 3, 4, 4), _rand(4, 3, 2, 2)
    where = ([2, 2], [0, 0], [1, 1], False, [0, 0], 1)
    logs, labels, some = torch.log_softmax(_rand(8, 8), 1), _ints(8), _rand()
    labels[1] = labels[6] = -100
    calls = [
        OneCall("norm", aten.native_layer_norm.default, (x, [8], w, b, 1e-5), fixed=frozenset({1, 2})),
        OneCall("norm without weight", aten.native_layer_norm.default, (x, [8], None, None, 1e-5)),
        OneCall("norm backward", aten.native_layer_norm_backward.default, (g, x, [8], mean, rstd, w, b, [True] * 3),
                fixed=frozenset({1, 2, 3, 4, 5})),
        OneCall("norm backward without weight", aten.native_layer_norm_backward.default,
                (g, x, [8], mean, rstd, None, None, [True, False, False]), fixed=frozenset({1, 2, 3})),
        OneCall("convolution", aten.convolution.default, (image, kernel, _rand(4), *where), fixed=frozenset({1, 2})),
        OneCall("convolution backward", aten.convolution_backward.default,
                (_rand(4, 4, 2, 2), image, kernel, [4], *where, [True] * 3), fixed=frozenset({2})),
        OneCall("embedding", aten.embedding.default, (_rand(8, 8), ids), fixed=frozenset({0, 1})),
        OneCall("embedding with padding", aten.embedding.default, (_rand(8, 8), ids, 3), fixed=frozenset({0, 1})),
    ]  # fmt: skip
    for padding in (-1, 3):
        calls.append(OneCall(f"embedding backward, padding {padding}", aten.embedding_dense_backward.default,
                             (g, ids, 8, padding, False), fixed=frozenset({1})))  # fmt: skip
    for reduction, count in ((1, torch.tensor(6.0).double()), (2, torch.tensor(6.0).double())):
        calls.append(OneCall(f"loss, reduction {reduction}", aten.nll_loss_forward.default,
                             (logs, labels, None, reduction, -100), fixed=frozenset({1})))  # fmt: skip
        calls.append(OneCall(f"loss backward, reduction {reduction}", aten.nll_loss_backward.default,
                             (some, logs, labels, None, reduction, -100, count), fixed=frozenset({1, 2})))  # fmt: skip
    return calls


MAKERS: tuple[Callable[[], list[OneCall]], ...] = (_elementwise, _shapes, _sums, _attentions, _layers)
CALLS = {call.name: call for make in MAKERS for call in make()}
