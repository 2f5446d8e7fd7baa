"""A number among the arguments that changes is an input of the program where the forward only computes with it."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.programs import captures as captured_calls
from geminifx.passes.program.text import parse_program, print_program
from torch import Tensor, nn


class Scaled(nn.Module):
    """A block, and something that is computed with a number."""

    def __init__(self, computed: Callable[..., Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(1))
        self.norm = nn.Dropout(0.0)
        self.computed = computed

    def forward(self, x: Tensor, t: Any, **others: Any) -> Any:
        for block in self.blocks:
            x = self.norm(x + block(x))
        return self.computed(x, t, **others)


@pytest.fixture
def captures(monkeypatch) -> list[Any]:
    """The requests of all captures."""
    made, plain = [], captured_calls.capture

    def counted(*args: Any) -> Any:
        made.append(args[-1])
        return plain(*args)

    monkeypatch.setattr(captured_calls, "capture", counted)
    return made


def check_equal(model: nn.Module, numbers: list[Any], **options: Any) -> Any:
    """Outputs and gradients are plain PyTorch's for each number, bit by bit; returns the compiled model."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    plain, found = copy.deepcopy(model), geminifx.compile(model, **options)
    for number in numbers:
        results = []
        for each in (plain, found):
            each.zero_grad()
            y = each(x, number)
            if each.training and y.requires_grad:
                y.sum().backward()
            results.append([y, *(p.grad for p in each.parameters())])
        for right, value in zip(*results, strict=True):
            assert (right is None) == (value is None)
            if right is not None:
                torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)
    return found


FLOATS = [0.1, 0.25, -3.0, 0.0, math.inf, math.nan, 1e-40, 0.7]
INTS = [2, 5, -3, 7, 1, 2**40]

COMPUTED = {
    "a product": lambda x, t: x * t,
    "between two": lambda x, t: (1 - t) * x + t * x.sin(),
    "a quotient": lambda x, t: x / (t * t + 0.5),
    "a bound": lambda x, t: x.clamp(min=t),
    "a fill": lambda x, t: x.masked_fill(x > t, t) + torch.full((6,), t),
    "a choice": lambda x, t: torch.where(x > 0, t, x),
    "of whole numbers": lambda x, t: x + torch.arange(6) * t,
    "of conditions": lambda x, t: x + (x > 0) * t,
    "of no dimensions": lambda x, t: x * (x.mean() * t),
    "in place": lambda x, t: (x + 1).mul_(t),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_floats(name: str, captures) -> None:
    found = check_equal(Scaled(COMPUTED[name]), FLOATS)
    assert len(captures) == 2
    assert '"float | number:1"' in found.graph["training"]


@pytest.mark.parametrize("name", ["a product", "a quotient", "a bound", "a fill", "of whole numbers", "of conditions"])
def test_whole_numbers(name: str, captures) -> None:
    found = check_equal(Scaled(COMPUTED[name]), INTS)
    assert '"int | number:1"' in found.graph["training"] or len(captures) > len(INTS)
    assert (
        len(captures) == 2 or "quotient" in name
    )  # 0.5 makes a float of it, which torch does by an operator of its own


@pytest.mark.parametrize("computed", ["a product", "of whole numbers", "of conditions", "a fill"])
def test_types_are_promoted_as_numbers_are(computed: str, captures) -> None:
    """A tensor of no dimensions would promote whole numbers to float64."""
    plain = Scaled(COMPUTED[computed]).bfloat16().eval()
    found, x = geminifx.compile(copy.deepcopy(plain), precision="bf16"), torch.randn(3, 6).bfloat16()
    with torch.no_grad():
        for t in FLOATS:
            torch.testing.assert_close(found(x, t), plain(x, t), rtol=0, atol=0, equal_nan=True)
    assert len(captures) == 2


@pytest.mark.parametrize("options", [{"recompute": "all"}, {"placement": "cpu", "device_budget": "10MB"}], ids=str)
def test_under_every_plan(options: dict[str, Any], captures) -> None:
    check_equal(Scaled(COMPUTED["between two"]), FLOATS, **options)
    assert len(captures) == 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 512), nn.Linear(512, 32)

    def forward(self, x: Tensor, t: float) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) * (1 - t)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 32), nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, t: float) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, t)
        return x


def test_blocks_that_take_a_number_share_a_function(captures) -> None:
    found = check_equal(Stack(), FLOATS, placement="cpu")
    assert "box = [" in found.graph["training"]
    assert len(captures) == 2


def test_evaluation_has_a_program_of_its_own(captures) -> None:
    check_equal(Scaled(COMPUTED["between two"]).eval(), FLOATS)
    assert len(captures) == 2


def test_the_text_of_a_program_with_numbers_parses_back() -> None:
    found = check_equal(Scaled(COMPUTED["between two"]), FLOATS)
    flat = next(iter(found.session.last.values())).flat
    text = print_program(flat)
    assert "operator.sub(1.0, t)" in text
    assert print_program(parse_program(text)) == text


# -- numbers that decide more than values -------------------------------------------------------------------


BY_TEXT = {str(each): each for each in FLOATS}


def with_a_float(x: Tensor, t: float) -> Tensor:
    return x * 2 if isinstance(t, float) and t > 0.2 else x * t


DECIDING = {
    "a condition": lambda x, t: x if t > 0.2 else -x,
    "its truth": lambda x, t: x if t else -x,
    "isinstance": with_a_float,
    "its type": lambda x, t: x * 2 if type(t) is float and t > 0.2 else x * t,
    "its text": lambda x, t: x * BY_TEXT[f"{t}"],
    "as a key": lambda x, t: x * {each: i for i, each in enumerate(FLOATS)}.get(t, 0),
    "cut": lambda x, t: x * int(min(max(t, -2.0), 2.0) * 2 if t == t else 0),
    "math": lambda x, t: x * math.tanh(t),
    "the greater": lambda x, t: x * max(t, 0.2),
    "a tensor of it": lambda x, t: x * torch.tensor(t),
    "a factor of a sum": lambda x, t: torch.add(x, x.cos(), alpha=t),  # whose gradient looks whether it is 1
    "an exponent": lambda x, t: (x * x + 1) ** t,
    "caught": lambda x, t: _caught(x, t),
}


def _caught(x: Tensor, t: float) -> Tensor:
    try:
        return x if t > 0.2 else -x
    except Exception:
        return x * 5


@pytest.mark.parametrize("name", DECIDING)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_float_that_decides_is_a_constant(name: str, captures) -> None:
    found = check_equal(Scaled(DECIDING[name]), [0.1, 0.7, 0.0])
    assert "number:1" not in found.graph["training"]
    assert sum(not request.numbers for request in captures) == 3


WHOLE = {
    "a length": lambda x, t: x[:, :t],
    "an index": lambda x, t: x[:, t],
    "repetitions": lambda x, t: sum((x * i for i in range(t)), x),
    "a range": lambda x, t: x * torch.arange(t).sum(),
    "a shape": lambda x, t: x.unsqueeze(0).expand(t, -1, -1),
    "its parity": lambda x, t: x * 2 if t % 2 == 0 else x,
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_whole_number_that_decides_is_a_constant(name: str, captures) -> None:
    check_equal(Scaled(WHOLE[name]), [3, 2, 4, 2])
    assert sum(not request.numbers for request in captures) == 3


def test_a_number_that_decides_is_told_of_with_the_fourth(captures) -> None:
    found = geminifx.compile(Scaled(DECIDING["a condition"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in FLOATS[:3]:
            found(torch.ones(3, 6), t)
    with pytest.warns(UserWarning, match=r"the argument \[1\] came with a 4th value, 0\.0"):
        found(torch.ones(3, 6), FLOATS[3])


def test_a_number_that_comes_back_out_is_right(captures) -> None:
    found = geminifx.compile(Scaled(lambda x, t: (x * t, t)))
    assert [found(torch.ones(3, 6), t)[1] for t in (0.5, 0.25, 0.125)] == [0.5, 0.25, 0.125]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_of_two_numbers_one_may_decide(captures) -> None:
    model = Scaled(lambda x, t, step: x * t if step < 3 else x * t + 1)
    plain, found, x = copy.deepcopy(model), geminifx.compile(model), torch.randn(3, 6)
    for step in range(6):
        assert torch.equal(found(x, 0.1 * step, step=step), plain(x, 0.1 * step, step=step))
    before = len(captures)
    for t in FLOATS[:4]:
        assert torch.equal(found(x, t, step=5), plain(x, t, step=5))
    assert len(captures) == before
    assert '"float | number:1"' in found.graph["training"]


def test_after_a_change_of_the_model_a_number_may_decide(captures) -> None:
    def computed(x: Tensor, t: float) -> Tensor:
        return x * t if model.norm.p == 0.0 or t > 0.2 else -x

    model = Scaled(lambda x, t: x)
    model.computed = computed
    model.eval()
    found, x = geminifx.compile(model), torch.randn(3, 6)
    values = {t: found(x, t) for t in FLOATS[:3]}
    assert len(captures) == 2
    model.norm.p = 0.5
    for t in FLOATS[:3]:
        assert torch.equal(found(x, t), values[t] if t > 0.2 else -model(x, t).neg())


def test_a_loss_that_is_computed_in_pieces_stays_so() -> None:
    """Its scale is part of the operator, and no input."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 64, bias=False)

        def forward(self, x: Tensor, labels: Tensor, t: float) -> dict[str, Tensor]:
            logits = self.head(x) * t
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    found = geminifx.compile(Head(), fuse_loss=True)
    for t in (0.5, 0.7, 0.9):
        found(torch.randn(4, 8), torch.arange(4), t)["loss"].backward()
        assert "linear_cross_entropy" in found.graph["training"]


def test_the_search_for_infinities_looks_at_numbers() -> None:
    found = geminifx.compile(Scaled(COMPUTED["a product"]))
    x = torch.ones(3, 6)
    for t in (0.5, 0.25):
        found(x, t)
    assert found.first_nonfinite(x, 0.125) is None
    assert found.first_nonfinite(x, math.inf) == "input t"
