"""While one thread captures, others compute with torch's own functions, and capture one after the other."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.isa.threads import in_this_thread
from torch import Tensor, nn


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


def hooked() -> Tensor:
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: grad * 3)
    Double.apply(x).sum().backward()
    assert x.grad is not None
    return x.grad


def attended() -> Tensor:
    query = torch.ones(1, 1, 2, 4, requires_grad=True)
    attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    return torch.tensor([ord(c) for c in attended.grad_fn.name()])  # of torch's operator, or ours


def checked() -> Tensor:
    with pytest.raises(ValueError, match="negative"):
        torch._check_tensor_all_with(ValueError, torch.tensor([True, False]), lambda: "negative")
    return torch.ones(())


class Drops(nn.Module):
    layerdrop = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.layerdrop = 0.5

    def forward(self) -> Tensor:
        return torch.as_tensor(torch.rand([]))


def drawn() -> Tensor:
    torch.manual_seed(0)
    return Drops()()


class Beside(nn.Module):
    """Its forward waits for what another thread does."""

    def __init__(self, does: Callable[[], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            FOUND.append(pool.submit(self.does).result(timeout=60))
        return self.layer(x).square().mean()


FOUND: list[Any] = []


@pytest.mark.parametrize("does", [hooked, attended, checked, drawn])
def test_what_another_thread_does_is_as_ever(does: Callable[[], Tensor]) -> None:
    FOUND.clear()
    expected, model = does(), geminifx.compile(Beside(does), microbatches=2)
    model(torch.ones(4, 4)).backward()
    assert model.plan.microbatches == 2 and len(FOUND) > 2
    assert all(torch.equal(found, expected) for found in FOUND)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).mean()


def test_threads_that_capture_at_a_time_put_all_back() -> None:
    before = torch.rand, torch.nn.functional.scaled_dot_product_attention, Tensor.register_hook
    apply = vars(torch.autograd.Function)["apply"]
    torch.manual_seed(0)
    sources, x = [Mean() for _ in range(4)], torch.ones(4, 4)
    expected = [source(x) for source in sources]

    def run(source: nn.Module) -> Tensor:
        return geminifx.compile(source, microbatches=2)(x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, sources))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    after = torch.rand, torch.nn.functional.scaled_dot_product_attention, Tensor.register_hook
    assert after == before and vars(torch.autograd.Function)["apply"] is apply


def test_a_function_for_this_thread_is_another_one_in_others() -> None:
    function = in_this_thread(lambda x: x + 1, lambda x: x + 2)
    with ThreadPoolExecutor(1) as pool:
        assert (function(1), pool.submit(function, 1).result()) == (2, 3)
