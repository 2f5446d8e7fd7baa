"""What users do with a module that a compiler could easily get wrong."""

import copy
import gc
import pickle
from enum import Enum

import geminifx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa.errors import CaptureError, StateError
from torch import Tensor, nn


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_gradients_kept_from_one_step_do_not_change_in_the_next() -> None:
    model, x = geminifx.compile(small()), torch.randn(3, 4)
    model(x).sum().backward()
    kept, values = grads(model), [g.clone() for g in grads(model)]
    model.zero_grad()
    (2 * model(x)).sum().backward()
    assert all(torch.equal(k, v) for k, v in zip(kept, values, strict=True))
    assert all(torch.allclose(g, 2 * v) for g, v in zip(grads(model), values, strict=True))


@pytest.mark.parametrize("drop", ["loss", "output"])
def test_a_step_that_is_given_up_frees_its_activations_at_once(drop: str) -> None:
    """Without a garbage collection, which may come much too late for a budget."""
    model, x = geminifx.compile(small()), torch.randn(64, 4)
    model(x).sum().backward()
    model.zero_grad()
    device, base = model.session.hardware.tiers[0], model.session.hardware.tiers[0].used_bytes
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            output = model(x)
            loss = output.sum() if drop == "loss" else None
            assert device.used_bytes >= base + 64 * 8 * 4, "the hidden layer waits for a backward"
            del output, loss
            assert device.used_bytes == base
    finally:
        gc.enable()


def test_gradient_buffers_are_used_again_when_nobody_keeps_them() -> None:
    model, x = geminifx.compile(small()), torch.randn(3, 4)
    addresses = set()
    for _ in range(4):
        model(x).sum().backward()
        addresses.add(grads(model)[0].data_ptr())
        model.zero_grad()
    assert len(addresses) == 1


@pytest.mark.parametrize("lay_out", [lambda y: y.transpose(1, 2), lambda y: y[:, ::2].transpose(1, 2)])
def test_gradients_of_outputs_may_be_views_of_any_kind(lay_out) -> None:
    plain = nn.Linear(8, 4)
    model, x = geminifx.compile(copy.deepcopy(plain)), torch.randn(2, 6, 8)
    for module in (plain, model):
        scores = lay_out(module(x))
        F.cross_entropy(scores, torch.zeros(2, scores.shape[2], dtype=torch.int64)).backward()
    assert all(torch.equal(a, b) for a, b in zip(grads(model), grads(plain), strict=True))


def test_an_output_without_gradient_may_be_a_target() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x), target

    plain, x = Pair(), torch.randn(2, 4)
    model = geminifx.compile(copy.deepcopy(plain))
    for module in (plain, model):
        F.mse_loss(*module(x)).backward()
    assert torch.equal(model.student.weight.grad, plain.student.weight.grad)
    assert model.teacher.weight.grad is None


def test_autocast_around_the_call_changes_nothing() -> None:
    model, x = geminifx.compile(small()), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, model(x))


def test_a_low_precision_model_takes_one_batch_after_another() -> None:
    plain = small().bfloat16()
    model = geminifx.compile(copy.deepcopy(plain))
    for rows in (2, 3):
        x = torch.randn(rows, 4, dtype=torch.bfloat16)
        assert model(x).dtype == torch.bfloat16 and torch.equal(model(x), plain(x))
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_batch_norm_stays_in_float32_under_bf16() -> None:
    model = geminifx.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), precision="bf16")
    out = model(torch.randn(2, 3, 8, 8))
    out.sum().backward()
    layout = {slot.name: chunk.dtype for chunk in model.plan.layout.chunks for slot in chunk.slots}
    assert out.dtype == torch.bfloat16 and layout["0.weight"] == torch.bfloat16
    assert layout["1.weight"] == torch.float32 and model.state_dict()["1.running_mean"].dtype == torch.float32


def test_float32_buffers_under_bf16_are_named_where_they_meet_weights() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(4))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + self.table)

    with pytest.raises(CaptureError, match=r"linear \(.*bfloat16 and float32.*precision='fp32'"):
        geminifx.compile(Positions(), precision="bf16", example_inputs=(torch.randn(2, 4),))


def test_whole_numbers_where_floats_are_expected_are_named() -> None:
    with pytest.raises(CaptureError, match=r"0 \(linear\.py.*float32 and int64\. .* pass x\.float\(\)"):
        geminifx.compile(small(), example_inputs=(torch.ones(2, 4, dtype=torch.int64),))


def test_a_model_that_writes_to_its_input_is_refused_by_its_name() -> None:
    class Writes(nn.Linear):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features.add_(1))

    with pytest.raises(CaptureError, match="the model writes to features in its forward"):
        geminifx.compile(Writes(4, 4), example_inputs=(torch.ones(2, 4),))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_train(layer: type[nn.RNNBase]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(4, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    plain, x = Last(), torch.randn(2, 5, 4)
    model = geminifx.compile(copy.deepcopy(plain))
    for module in (plain, model):
        module(x).square().sum().backward()
    # Another order of the same products: a few units in the last place of sums of some 40 terms.
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads(model), grads(plain), strict=True))


def test_channels_last_models_keep_their_numbers() -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    model = geminifx.compile(copy.deepcopy(plain))
    assert torch.allclose(model(x), plain(x), atol=1e-6)  # other kernels for other layouts
    model(x).sum().backward()
    assert len(grads(model)) == 4


def test_inference_mode_first_and_training_afterwards() -> None:
    model, x = geminifx.compile(small(), precision="bf16"), torch.randn(3, 4)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert len(grads(model)) == 4


def test_arguments_that_only_look_equal_have_their_own_programs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, by: object) -> Tensor:
            return self.linear(x) * (2 if by is True else 3)

    model, x = geminifx.compile(Scaled()), torch.randn(2, 4)
    assert torch.allclose(model(x, True) * 3, model(x, 1) * 2)


class Kind(Enum):
    A = "a"


@pytest.mark.parametrize("argument", [np.ones(3), object(), {1, 2}, lambda: 0])
def test_arguments_whose_contents_may_change_are_refused(argument: object) -> None:
    class Ignores(nn.Linear):
        def forward(self, x: Tensor, other: object) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    model = geminifx.compile(Ignores(4, 4))
    model(torch.randn(2, 4), Kind.A)
    with pytest.raises(ValueError, match="contents a compiled program cannot follow"):
        model(torch.randn(2, 4), argument)


def test_changing_what_the_backward_reads_is_refused() -> None:
    model, x = geminifx.compile(small()), torch.randn(3, 4)
    out = model(x)
    x.zero_()
    with pytest.raises(StateError, match="an input or a buffer was changed"):
        out.sum().backward()


def test_a_parameter_that_was_replaced_is_refused() -> None:
    source = small()
    model = geminifx.compile(source, example_inputs=(torch.randn(3, 4),))
    source[2] = nn.Linear(8, 4)
    with pytest.raises(StateError, match=r"parameter 2\.weight was added, removed or replaced"):
        model(torch.randn(3, 4))


def test_the_sources_own_train_is_asked() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self.norm.eval()
            return self

    model = geminifx.compile(Frozen())
    model.train()
    assert model.training and not model.norm.training
    model(torch.randn(8, 4))
    assert model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("result", [None, 3.0, {"loss": 1.0}])
def test_a_result_without_tensors_is_refused(result: object) -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> object:  # type: ignore[override]
            super().forward(x)
            return result

    with pytest.raises(CaptureError, match="holds no tensor"):
        geminifx.compile(Odd(4, 4))(torch.randn(2, 4))


def test_pickling_says_what_to_do_instead() -> None:
    with pytest.raises(StateError, match="state_dict"):
        pickle.dumps(geminifx.compile(small()))
