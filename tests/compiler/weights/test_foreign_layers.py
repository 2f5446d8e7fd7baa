"""Layers of bitsandbytes and torchao as parts of a model: their hooks, attributes and places, and what a compilation
that fails leaves of them. Stand-ins with the libraries' names compute what the libraries do."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import geminifx
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from geminifx.compiler.weights.quantized_weights import quantized_weights
from geminifx.compiler.world import FROZEN
from geminifx.runtime.isa.errors import ArgumentError
from geminifx.runtime.isa.quantized import DEQUANTIZE, NF4
from geminifx.runtime.kernels.packed import torchao_int8
from geminifx.runtime.kernels.quantized import quantize
from torch import Tensor, nn

WIDTH = 64


class QuantState:
    """What bitsandbytes knows of a weight of 4 bits."""

    def __init__(self, scales: Tensor, shape: torch.Size, kind: str) -> None:
        self.scales, self.shape, self.kind = scales, shape, kind

    def as_dict(self) -> dict[str, Any]:
        return {"quant_type": self.kind, "absmax": self.scales, "blocksize": 64, "quant_map": torch.tensor(NF4),
                "dtype": "float32", "shape": tuple(self.shape)}  # fmt: skip


class Linear4bit(nn.Linear):
    __module__ = "bitsandbytes.nn.modules"

    def __init__(self, kind: str = "nf4") -> None:
        super().__init__(WIDTH, WIDTH)
        codes, scales = quantize(self.weight.detach(), "nf4")
        self.quant_state = QuantState(scales, self.weight.shape, kind)
        self.weight = nn.Parameter(codes[:, None], requires_grad=False)
        self.weight.quant_state = self.quant_state

    def forward(self, x: Tensor) -> Tensor:
        state = self.weight.quant_state
        values = DEQUANTIZE(self.weight.view(-1), state.scales, "nf4", list(state.shape), x.dtype)
        return nn.functional.linear(x, values, self.bias)


class Linear8bitLt(nn.Linear):
    __module__ = "bitsandbytes.nn.modules"

    def __init__(self, bias: bool = True) -> None:
        super().__init__(WIDTH, WIDTH, bias=bias)
        codes, scales = quantize(self.weight.detach(), "int8")
        self.weight, self.state = nn.Parameter(codes, requires_grad=False), SimpleNamespace(SCB=None)
        self.weight.SCB = scales

    def forward(self, x: Tensor) -> Tensor:
        values = DEQUANTIZE(self.weight, self.weight.SCB, "int8", list(self.weight.shape), x.dtype)
        return nn.functional.linear(x, values, self.bias)


class Int8Tensor(Tensor):
    """A weight as torchao has it: of the dtype that it had before, with codes and scales inside."""

    __module__ = "torchao.quantization"
    data = property(lambda self: self)

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Tensor":
        made = weight.detach().as_subclass(cls)
        made.qdata, scales = quantize(weight.detach().float(), "int8")
        made.scale, made.block_size = (scales / 127)[:, None], (1, weight.shape[1])
        return made

    def detach(self) -> "Int8Tensor":
        return self


class Net(nn.Module):
    """Two quantised layers and a trained one between them."""

    def __init__(self, make: Callable[[], nn.Module] = Linear4bit, last: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = make(), nn.Linear(WIDTH, WIDTH), (last or make)()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x))))).square().mean()


class Twice(Net):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.last = self.first


class Listed(Net):
    """Layers that the forward finds in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.first, self.middle, self.last]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


class Scaled(Net):
    """A number kept on a quantised layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first.scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.first.scale)


def hooked() -> Net:
    model = Net()
    model.first.register_forward_hook(lambda module, args, output: output * 2)
    return model


def moved() -> Net:
    """As accelerate's device_map leaves layers."""
    model = Net()
    add_hook_to_module(model.first, AlignDevicesHook(execution_device="cpu"))
    return model


def batch() -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, **options: Any) -> geminifx.CompiledModule:
    return geminifx.compile(model, device="cpu", **{"device_budget": "100MB", **options})


@pytest.mark.filterwarnings("ignore:.*has a forward hook")
@pytest.mark.parametrize("make", [Net, lambda: Net(Linear8bitLt), Twice, Listed, Scaled, hooked, moved,
                                  Linear4bit])  # fmt: skip
def test_training_is_that_of_the_library(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model = compiled(make())
    for each in (plain, model):
        each(batch()).square().mean().backward()
    assert torch.equal(model(batch()), plain(batch()))
    found = dict(model.named_parameters())
    trained = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert trained and all(torch.equal(found[name].grad, grad) for name, grad in trained.items())


def test_a_layer_in_two_places_stays_one() -> None:
    source = Twice()
    compiled(source)
    assert source.first is source.last and isinstance(source.first, nn.Linear) and len(quantized_weights(source)) == 1


def test_hooks_of_a_quantised_layer_are_told_of() -> None:
    with pytest.warns(UserWarning, match="first has a forward hook"):
        compiled(hooked(), example_inputs=(batch(),))
    model = Net()
    model.first.register_full_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(geminifx.CaptureError, match="first has a backward hook"):
        compiled(model, example_inputs=(batch(),))


def replaced(model: Net) -> None:
    model.last.forward = lambda x: x * 2


def replaced_under_accelerate(model: Net) -> None:
    replaced(model)
    add_hook_to_module(model.last, AlignDevicesHook(execution_device="cpu"))


def replaced_over_accelerate(model: Net) -> None:
    add_hook_to_module(model.last, AlignDevicesHook(execution_device="cpu"))
    replaced(model)


def hooked_by_accelerate(model: Net) -> None:
    add_hook_to_module(model.last, type("Doubling", (ModelHook,), {"post_forward": lambda self, _, out: out * 2})())


@pytest.mark.parametrize(
    "change", [replaced, replaced_under_accelerate, replaced_over_accelerate, hooked_by_accelerate]
)
def test_a_forward_that_would_not_run_is_refused(change: Callable[[Net], None]) -> None:
    source = Net()
    change(source)
    expected = source(batch())
    with pytest.raises(ArgumentError, match="model: last is a Linear4bit whose forward was replaced"):
        compiled(source)
    assert type(source.first) is Linear4bit and torch.equal(source(batch()), expected)


def unreadable() -> Net:
    return Net(last=lambda: Linear4bit("fp4"))


FAILING: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "nothing fits": (moved, {"device_budget": "1kB", "example_inputs": (batch(),)}, geminifx.BudgetError, "bytes"),
    "a layer that is not read": (unreadable, {}, ArgumentError, "last is a Linear4bit whose 4-bit codes are fp4"),
    "a number of processes": (
        Net, {"world_size": 2, "parallel": "auto", "example_inputs": (batch(),)}, ArgumentError, "quantised weights",
    ),
    "another format": (
        lambda: Net(Linear8bitLt), {"frozen": "nf4"}, ArgumentError,
        "already quantised as int8, by an earlier compile.., bitsandbytes or torchao",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", FAILING)
def test_a_model_whose_compilation_fails_is_as_it_was(why: str) -> None:
    build, options, error, message = FAILING[why]
    source = build()
    expected, parameters = source(batch()), list(source.named_parameters())
    before = [(type(module), dict(vars(module))) for module in source.modules()]
    with pytest.raises(error, match=message):
        compiled(source, **options)
    assert [(type(module), dict(vars(module))) for module in source.modules()] == before
    for (name, found), (known, parameter) in zip(source.named_parameters(), parameters, strict=True):
        assert name == known and found is parameter
    assert torch.equal(source(batch()), expected)


def test_several_processes_have_their_parts_of_the_batch() -> None:
    plan = compiled(Net(), world_size=2, example_inputs=(batch(),)).plan
    assert FROZEN in str(plan) and "data 2" in str(plan)


def dtype_before(source: nn.Module) -> torch.dtype:
    compiled(source)
    return quantized_weights(source)["last.weight"].weight.dtype_before


class Mixed(nn.Module):
    """A float32 module, whose dtype is that of the model's first parameter, and a quantised one in bfloat16."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x).bfloat16()).float().square().mean()


class Doubled(nn.Linear):
    """A layer of somebody's own, whose weight torchao may quantise as it does that of any nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_weight_of_torchao_leaves_its_layer_what_it_is() -> None:
    source, plain = (Net(lambda: Doubled(WIDTH, WIDTH)) for _ in range(2))
    for name in ("first", "last"):
        layer = source.get_submodule(name)
        layer.weight = nn.Parameter(Int8Tensor.of(layer.weight), requires_grad=False)
        plain.get_submodule(name).weight.data.copy_(torchao_int8(layer.weight).values)
    loss, expected = compiled(source)(batch()), plain(batch())
    assert torch.equal(loss, expected) and isinstance(source.first, Doubled)


def test_weights_keep_their_dtype_where_it_is_known() -> None:
    of_torchao = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16, bias=False)
    of_torchao.weight = nn.Parameter(Int8Tensor.of(of_torchao.weight), requires_grad=False)
    assert dtype_before(Mixed(of_torchao)) == torch.bfloat16
    of_bitsandbytes = Linear8bitLt()
    of_bitsandbytes.bias.data = of_bitsandbytes.bias.data.bfloat16()
    assert dtype_before(Mixed(of_bitsandbytes)) == torch.bfloat16
    assert dtype_before(Mixed(Linear8bitLt(bias=False))) == torch.float32
