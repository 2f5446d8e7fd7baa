"""Functions that stand for operators: they dispatch the same overload, with the same arguments."""

from typing import Any

import pytest
import torch
from geminifx.runtime.isa.torch_private import TorchDispatchMode
from geminifx.runtime.quick_calls import FUNCTIONS, Operators

A, B = torch.arange(6.0).view(2, 3), torch.ones(3)
SQUARE, STACK = torch.arange(9.0).view(3, 3), torch.arange(12.0).view(2, 2, 3)
CALLS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "add.Tensor": [((A, B), {}), ((A, 2), {}), ((A, B), {"alpha": 3})],
    "addmm.default": [((B, A, SQUARE), {}), ((B, A, SQUARE), {"beta": 0.5, "alpha": 2})],
    "bmm.default": [((STACK, STACK.transpose(1, 2)), {})],
    "div.Tensor": [((A, B), {}), ((A, 2.5), {})],
    "embedding.default": [((A, torch.tensor([1, 0])), {}), ((A, torch.tensor([1, 0]), 1), {})],
    "expand.default": [((B, [4, 3]), {}), ((B, [4, -1]), {"implicit": True})],
    "mm.default": [((A, SQUARE), {})],
    "mul.Tensor": [((A, B), {}), ((A, 0.25), {})],
    "native_layer_norm.default": [((A, [3], B, B, 1e-5), {}), ((A, [3], None, None, 1e-5), {})],
    "permute.default": [((STACK, [2, 0, -2]), {})],
    "relu.default": [((A - 3,), {})],
    "sub.Tensor": [((A, B), {}), ((A, 1), {}), ((A, B), {"alpha": 2})],
    "sum.dim_IntList": [((A, [0]), {}), ((A, [-1], True), {}), ((A, [0]), {"dtype": torch.float64}), ((A, []), {})],
    "t.default": [((A,), {})],
    "transpose.int": [((STACK, 0, -1), {})],
    "unsqueeze.default": [((A, -1), {})],
    "view.default": [((A, [3, 2]), {}), ((A, [-1]), {})],
}


class Calls(TorchDispatchMode):
    """Records what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(f"{func} {args} {kwargs or {}}")
        return func(*args, **(kwargs or {}))


def test_every_function_is_tried() -> None:
    assert set(CALLS) == {str(operator).removeprefix("aten.") for operator in FUNCTIONS}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_dispatches_its_overload(name: str) -> None:
    operator, overload = name.split(".")
    expected = getattr(getattr(torch.ops.aten, operator), overload)
    called = getattr(getattr(Operators(torch.ops.aten), operator), overload)
    assert called is FUNCTIONS[expected]
    for args, kwargs in CALLS[name]:
        with torch.no_grad(), Calls() as own:
            found = called(*args, **kwargs)
        with torch.no_grad(), Calls() as plain:
            wanted = expected(*args, **kwargs)
        assert own.seen == plain.seen and len(own.seen) == 1
        pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
        assert all(torch.equal(mine, other) and mine.stride() == other.stride() for mine, other in pairs)


def test_others_are_torch_s_own() -> None:
    aten = Operators(torch.ops.aten)
    assert aten.exp.default is torch.ops.aten.exp.default and "exp" in vars(aten)
    with pytest.raises(AttributeError):
        _ = aten.exp.no_such_overload
