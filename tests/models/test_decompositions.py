"""Functions that torch's tracer takes apart wrongly: taken apart by ours they equal torch's kernels."""

import itertools
from typing import Any

import geminifx
import pytest
import torch
from geminifx.models.decompositions import right_decompositions
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

KINDS: dict[str, Any] = {
    "LSTM": nn.LSTM, "LSTM, projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=3, **options),
    "GRU": nn.GRU, "RNN": nn.RNN, "RNN, relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}  # fmt: skip


def layers(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = KINDS[kind](5, 6, 3, dropout=0.4, **options)
    return made


def flat(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def drawn(model: nn.Module, x: Any) -> list[Tensor]:
    torch.manual_seed(1)
    found = flat(model(x))
    return [*found, torch.rand(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first, bidirectional", itertools.product([False, True], repeat=2))
def test_layers_one_by_one_are_the_whole_stack(kind: str, batch_first: bool, bidirectional: bool) -> None:
    model = layers(kind, batch_first=batch_first, bidirectional=bidirectional)
    packed = pack_sequence([torch.randn(length, 5) for length in (4, 2, 1)])
    for x in (torch.randn(4, 2, 5), torch.randn(4, 5), packed):
        for is_training in (True, False):
            model.train(is_training)
            expected = drawn(model, x)
            with right_decompositions():
                found = drawn(model, x)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_stack_drops_what_the_plain_one_drops(kind: str) -> None:
    plain, model, x = layers(kind), geminifx.compile(layers(kind), placement="cpu"), torch.randn(4, 2, 5)
    expected, found = drawn(plain, x), drawn(model, x)
    assert all(map(torch.equal, expected[-1:], found[-1:])), "as many random numbers"
    found[0].square().mean().backward()
    expected[0].square().mean().backward()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


TARGETS = torch.tensor([[1, 3, -1, 2], [0, -1, 1, 1], [-1, 0, 1, 2], [3, 2, 1, 0], [2, 2, -1, -1]])


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"size_average": False},
                                     {"reduce": False}])  # fmt: skip
@pytest.mark.parametrize("rows", [slice(None), 0])
def test_classes_behind_the_first_minus_one_do_not_count(options: dict[str, Any], rows: Any) -> None:
    x = torch.randn(5, 4)[rows].requires_grad_()
    expected = F.multilabel_margin_loss(x, TARGETS[rows], **options)
    with right_decompositions():
        found = F.multilabel_margin_loss(x, TARGETS[rows], **options)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(loss.sum(), x)[0] for loss in (found, expected))
    torch.testing.assert_close(*grads)


def test_a_compiled_loss_over_several_classes_is_the_plain_one() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.multilabel_margin_loss(self.head(x), labels)}

    torch.manual_seed(0)
    plain, x = Classes(), torch.randn(5, 3)
    model = geminifx.compile(plain, placement="cpu")
    with torch.no_grad():
        expected = F.multilabel_margin_loss(x @ plain.head.weight.T + plain.head.bias, TARGETS)
    torch.testing.assert_close(model(x, labels=TARGETS)["loss"].detach(), expected)


def test_afterwards_torchs_functions_are_its_own() -> None:
    before = torch.lstm, torch._VF.gru, F.multilabel_margin_loss
    with right_decompositions():
        assert torch.lstm is not before[0]
    assert (torch.lstm, torch._VF.gru, F.multilabel_margin_loss) == before
