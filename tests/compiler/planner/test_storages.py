"""The storages that kernels make are never larger than planned, and a view is known for one."""

import random
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.compiler.planner.storages import storage_bytes
from geminifx.passes.program.program import Program, aliased_inputs
from geminifx.passes.program.types import TensorType
from geminifx.runtime.isa.errors import BudgetError
from operators import DTYPES, IMAGES, OTHERS, WHOLE, arguments, pointwise
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

pytestmark = pytest.mark.usefixtures("shared")

aten = torch.ops.aten
ROWS, SOME = torch.tensor([2, 0, 1]), slice(1, 3)


def flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1)


def below(x: Tensor) -> Tensor:
    """Classes, one for each row."""
    return torch.arange(x.shape[0]) % 3


CALLS: dict[str, Callable[[Tensor, Tensor], tuple[Any, ...]]] = {
    **{
        f"{op}, {how}": partial(lambda op, how, x, y: (op, x, y, how), op, how)
        for op in (aten.mse_loss.default, aten.smooth_l1_loss.default, aten.soft_margin_loss.default)
        for how in (0, 1, 2)
    },
    "binary_cross_entropy": lambda x, y: (aten.binary_cross_entropy.default, x, y),
    "mse_loss, broadcast": lambda x, y: (aten.mse_loss.default, x[:1], y),
    "huber_loss": lambda x, y: (aten.huber_loss.default, x, y),
    "nll_loss": lambda x, y: (aten.nll_loss_forward.default, flat(x), below(x), None, 1, -100),
    "copy": lambda x, y: (aten.copy.default, x[0, SOME], y[0, SOME]),
    "select_scatter": lambda x, y: (aten.select_scatter.default, x[:, SOME], y[:, 0], 1, 0),
    "slice_scatter": lambda x, y: (aten.slice_scatter.default, x[:, SOME], y[:, :1], 1, 0, 1),
    "diagonal_scatter": lambda x, y: (aten.diagonal_scatter.default, x[0], y[0].diagonal().clone()),
    "as_strided_scatter": lambda x, y: (aten.as_strided_scatter.default, x[0], torch.ones(2), [2], [1], 0),
    "resize": lambda x, y: (aten.resize.default, x[0, 0], [2]),
    "index_put": lambda x, y: (aten.index_put.default, x[:, SOME], [ROWS[1:2]], y[:1, SOME], True),
    "index": lambda x, y: (aten.index.Tensor, x, [None, ROWS]),
    "index_select": lambda x, y: (aten.index_select.default, x, 1, ROWS),
    "masked_scatter": lambda x, y: (aten.masked_scatter.default, x, x > 0.5, y),
    "fill": lambda x, y: (aten.fill.Scalar, x[..., ::2], 1.0),
    "bernoulli": lambda x, y: (aten.bernoulli.p, x, 0.5),
    "bernoulli_like": lambda x, y: (torch.ops.geminifx.bernoulli_like.default, x.contiguous()[:, SOME], 0.5),
    "rand_like": lambda x, y: (aten.rand_like.default, x),
    "native_dropout": lambda x, y: (aten.native_dropout.default, x, 0.5, True),
    "embedding": lambda x, y: (aten.embedding.default, flat(x), below(x)),
    "embedding_bag": lambda x, y: (aten._embedding_bag.default, flat(x), below(x), torch.tensor([0, 1])),
    "embedding_backward": lambda x, y: (aten.embedding_dense_backward.default, flat(x), below(x), 5, -1, False),
    "unsafe_split": lambda x, y: (aten.unsafe_split.Tensor, x, 1, 1),
    "unsafe_split_with_sizes": lambda x, y: (aten.unsafe_split_with_sizes.default, x, [1, 2], 1),
    "unsafe_chunk": lambda x, y: (aten.unsafe_chunk.default, x, 3, 1),
    "unsafe_view": lambda x, y: (aten._unsafe_view.default, x.contiguous(), [-1]),
    "split": lambda x, y: (aten.split.Tensor, x, 1, 1),
    "unbind": lambda x, y: (aten.unbind.int, x, 1),
    "unfold": lambda x, y: (aten.unfold.default, x, 3, 2, 1),
    "sort": lambda x, y: (aten.sort.default, x, 1),
    "topk": lambda x, y: (aten.topk.default, x, 2, 1),
    "max": lambda x, y: (aten.max.dim, x, 1),
    "median": lambda x, y: (aten.median.dim, x, 1),
    "kthvalue": lambda x, y: (aten.kthvalue.default, x, 2, 1),
    "argmax": lambda x, y: (aten.argmax.default, x, 1),
    "mean": lambda x, y: (aten.mean.default, x),
    "logsumexp": lambda x, y: (aten.logsumexp.default, x, [1]),
    "norm": lambda x, y: (aten.linalg_vector_norm.default, x),
    "cumprod": lambda x, y: (aten.cumprod.default, x, 1),
    "cummax": lambda x, y: (aten.cummax.default, x, 1),
    "mm": lambda x, y: (aten.mm.default, x[0, 0], y[0, 0].t()),
    "addmm": lambda x, y: (aten.addmm.default, torch.ones(4), x[0, 0], y[0, 0].t()),
    "baddbmm": lambda x, y: (aten.baddbmm.default, torch.ones(4), x[0], y[0].transpose(1, 2)),
    "addmv": lambda x, y: (aten.addmv.default, torch.ones(4), x[0, 0], y[0, 0, 0]),
    "max_pool2d": lambda x, y: (aten.max_pool2d_with_indices.default, x, [2, 2], [1, 1]),
    "avg_pool2d": lambda x, y: (aten.avg_pool2d.default, x, [2, 2]),
    "adaptive_avg_pool2d": lambda x, y: (aten._adaptive_avg_pool2d.default, x, [2, 2]),
    "upsample_bilinear2d": lambda x, y: (aten.upsample_bilinear2d.default, x, [8, 10], False),
    "grid_sampler_2d": lambda x, y: (aten.grid_sampler_2d.default, x, torch.zeros(x.shape[0], 2, 2, 2), 0, 0, False),
    "convolution, transposed": lambda x, y: (
        aten.convolution.default, x, torch.ones(3, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1),
    "convolution_backward": lambda x, y: (
        aten.convolution_backward.default, y[..., 2:, 2:], x, torch.ones(3, 3, 3, 3), [3], [1, 1], [0, 0], [1, 1],
        False, [0, 0], 1, [True, True, True]),
    "fft": lambda x, y: (aten._fft_r2c.default, x, [3], 0, True),
    "inverse fft": lambda x, y: (aten._fft_c2r.default, torch.fft.rfft(x), [3], 0, 5),
    "qr": lambda x, y: (aten.linalg_qr.default, x[0, 0].t()),
    "svd": lambda x, y: (aten._linalg_svd.default, x[0, 0]),
    "eigh": lambda x, y: (aten._linalg_eigh.default, x[0, :, :3, :3]),
    "solve": lambda x, y: (aten._linalg_solve_ex.default, torch.eye(4) * 2, y[0, 0]),
    "cdist": lambda x, y: (aten._cdist_forward.default, x[0], y[0], 2.0, None),
    "repeat": lambda x, y: (aten.repeat.default, x, [1, 2, 1, 1]),
    "flip": lambda x, y: (aten.flip.default, x, [1]),
    "to bfloat16": lambda x, y: (aten._to_copy.default, x),
}  # fmt: skip
"""Operators that make several tensors, tensors of other shapes or views, as functions of two tensors: the call."""


def planned(real: dict[fx.Node, Tensor], target: Any, args: Any, kwargs: Any) -> tuple[fx.Node, list[int]]:
    """The node of a call in a program, and what is planned for its results; `real` gains the tensors of its inputs."""
    program = Program("evaluation")
    program.set_results({})

    def input_of(tensor: Tensor) -> fx.Node:
        node = program.add_input(f"x_{len(real)}", TensorType.of(tensor), f"input:{len(real)}")
        real[node] = tensor
        return node

    args, kwargs = tree_map_only(Tensor, input_of, (tuple(args), dict(kwargs)))
    node = program.emit(target, args, kwargs, before=program.output)
    return node, storage_bytes(node, lambda value: real[value].untyped_storage().nbytes())


def check(target: Any, *args: Any, **kwargs: Any) -> None:
    inputs: dict[fx.Node, Tensor] = {}
    results = [t for t in tree_leaves(target(*args, **kwargs)) if isinstance(t, Tensor)]
    node, num_bytes = planned(inputs, target, args, kwargs)
    assert len(num_bytes) == len(results)
    known = {inputs[value].untyped_storage()._cdata for value in aliased_inputs(node)}
    for result, most in zip(results, num_bytes, strict=True):
        storage = result.untyped_storage()
        if any(storage._cdata == t.untyped_storage()._cdata for t in inputs.values()):
            assert storage._cdata in known, "a view that is not known for one"
        else:
            assert storage.nbytes() <= most, (str(target), [(t.shape, t.stride()) for t in inputs.values()])


@pytest.mark.parametrize("name", CALLS)
def test_storages_are_as_large_as_planned(name: str) -> None:
    for x, y in product(IMAGES.values(), repeat=2):
        check(*CALLS[name](x, y))


@pytest.mark.parametrize("op", OTHERS, ids=str)
def test_storages_of_other_operators_are_as_large_as_planned(op: Any) -> None:
    for x, y in product(IMAGES.values(), repeat=2):
        OTHERS[op](partial(check, op), x, y)


@pytest.mark.slow
@pytest.mark.parametrize("op", pointwise(), ids=str)
def test_storages_of_pointwise_operators_are_as_large_as_planned(op: Any) -> None:
    generator = random.Random(str(op))
    called = 0
    for i in range(20):
        for dtypes in DTYPES:
            args, kwargs = arguments(op, generator, dtypes, whole=i % 3 == 0 or any(w in str(op) for w in WHOLE))
            try:
                op(*args, **kwargs)
            except (RuntimeError, TypeError, NotImplementedError, IndexError):
                continue
            called += 1
            check(op, *args, **kwargs)
            break
    assert called > 10


LOSSES = {
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "l1": F.l1_loss,
    "bce": lambda out, y: F.binary_cross_entropy(out.sigmoid(), y.sigmoid()),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_budget_that_is_accepted_has_room_for_what_stays_behind_a_loss(loss: str) -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1000)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return LOSSES[loss](self.layer(x), y)

    inputs = {"x": torch.ones(8, 4), "y": torch.zeros(8, 1000)}
    with pytest.raises(BudgetError) as refused:
        geminifx.compile(Scored(), device_budget=1, example_inputs=inputs)
    least = refused.value.smallest_bytes
    model = geminifx.compile(Scored(), device_budget=least, example_inputs=inputs)
    for _ in range(2):
        model(**inputs).backward()
    assert model.stats.device_peak_bytes <= model.plan.peak_bytes <= least
