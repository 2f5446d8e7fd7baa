"""The device kernel: the host kernel's bits, from Triton on a GPU and from plain torch anywhere."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from geminifx.runtime.kernels import device_updates as device_kernel
from geminifx.runtime.kernels import reference_updates
from geminifx.runtime.kernels.device_updates import DeviceKernel, available_variants
from geminifx.runtime.kernels.host_updates import HostKernel
from geminifx.runtime.kernels.split_pairs import SplitPair, split
from geminifx.runtime.kernels.update_rules import AdamHyper, AdamMoments, Gradient, LionHyper, SgdHyper
from torch import Tensor
from updates import ADAMW, DRAWS, DTYPES, RULES, SGDS, STORED, Hyper, Problem, any_bits, usual

STEPS = 5
EVERY_RULE = pytest.mark.parametrize("hyper", RULES, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_WAY = pytest.mark.parametrize("moments", STORED.values(), ids=STORED)
EVERY_KIND = pytest.mark.parametrize("values", (usual, any_bits), ids=("usual", "any"))


def at(hyper: Hyper, number: int) -> Hyper:
    """Return the rule at a later step, 0 being the one it is for."""
    if isinstance(hyper, AdamHyper):
        return replace(hyper, step=hyper.step + number)
    if isinstance(hyper, LionHyper):
        return hyper
    return replace(hyper, first=hyper.first and number == 0)


def buffer(tensor: Tensor) -> Tensor:
    """Return the whole of the buffer that a vector is a part of."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def moved(problem: Problem, device: str) -> None:
    """Move a problem's buffers to a device, or back, keeping each vector's place in its buffer."""

    def move(tensor: Tensor) -> Tensor:
        return buffer(tensor).to(device)[tensor.storage_offset() :][: tensor.numel()]

    pair, gradient, moments = problem.pair, problem.gradient, problem.moments
    problem.pair = SplitPair(move(pair.hi), None if pair.lo is None else move(pair.lo), pair.draws)
    scale = gradient.scale.to(device) if isinstance(gradient.scale, Tensor) else gradient.scale
    problem.gradient = Gradient(move(gradient.values), scale)
    problem.moments = AdamMoments(move(moments.mean), move(moments.square))


def check(kernel: DeviceKernel, hyper: Hyper, make: Callable[[], Problem], device: str) -> None:
    """Take a few steps with the host kernel and with `kernel`; every bit is the same after each of them."""
    expected, found, host = make(), make(), HostKernel()
    for number in range(STEPS):
        expected.gradient.values.copy_(expected.gradient.values.roll(number))
        found.gradient.values.copy_(expected.gradient.values)
        expected.update(host, at(hyper, number))
        moved(found, device)
        found.update(kernel, at(hyper, number))
        moved(found, "cpu")
        assert found.equals(expected), f"step {number}"
    for tensor in (*found.pair.tensors, found.moments.mean, found.moments.square):
        tensor.zero_()
        assert not buffer(tensor).any(), "wrote beside the vector"


# -- plain torch, on any machine -----------------------------------------------------------------------------


@EVERY_RULE
@EVERY_DTYPE
@EVERY_KIND
def test_plain_torch_gives_the_host_kernels_bits(hyper, dtype, values):
    check(DeviceKernel("torch"), hyper, lambda: Problem(1500 + 7, 3, dtype, 128, values), "cpu")


@EVERY_RULE
@pytest.mark.parametrize("draws", [None, DRAWS], ids=["exact", "rounded"])
def test_plain_torch_as_a_device_runs_it(hyper, draws, monkeypatch):
    """Without fused operations and in several pieces."""
    monkeypatch.setattr(reference_updates, "torch_fuses", lambda: False)
    monkeypatch.setattr(reference_updates, "pieces", lambda flat, _: (slice(0, 1000), slice(1000, flat.numel())))
    check(DeviceKernel("torch"), hyper, lambda: Problem(1500 + 7, 4, torch.bfloat16, 128, draws=draws), "cpu")


def with_scale_tensor(problem: Problem) -> Problem:
    problem.gradient = Gradient(problem.gradient.values, torch.tensor(-0.37))
    return problem


@pytest.mark.parametrize("hyper", (ADAMW, SGDS[2]), ids=str)
def test_a_scale_may_be_a_tensor(hyper):
    check(DeviceKernel("torch"), hyper, lambda: with_scale_tensor(Problem(300, 3, torch.float16)), "cpu")


def test_nothing_and_one_weight():
    for hyper in (ADAMW, SGDS[2]):
        for numel in (0, 1):
            check(DeviceKernel("torch"), hyper, lambda numel=numel: Problem(numel, 3, torch.bfloat16), "cpu")


def test_weights_that_require_gradients_are_updated_in_place():
    problem, expected = Problem(100, 3, torch.bfloat16), Problem(100, 3, torch.bfloat16)
    weight = problem.pair.hi.requires_grad_()
    problem.update(DeviceKernel("torch"), ADAMW)
    expected.update(HostKernel(), ADAMW)
    assert problem.pair.hi is weight and problem.equals(expected)


# -- Triton's interpreter --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which interprets its kernels")
def test_an_interpreted_kernel_gives_the_host_kernels_bits():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    script = Path(__file__).parents[2] / "support" / "interpreted_updates.py"
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gradient": Gradient(torch.zeros(9))}, "9"),
        ({"gradient": Gradient(torch.zeros(8, dtype=torch.float64))}, "float64"),
        ({"gradient": Gradient(torch.zeros(16)[::2])}, "strides"),
        ({"gradient": Gradient(torch.zeros(8), torch.zeros((), device="meta"))}, "scale there, not on meta"),
        ({"moments": AdamMoments(torch.zeros(8), torch.zeros(8).bfloat16())}, "float32"),
        ({"moments": AdamMoments(torch.zeros(8), torch.zeros(8, device="meta"))}, "meta"),
        ({"pair": split(torch.zeros(2, 4))}, "vectors"),
        ({"gradient": Gradient(torch.zeros(2, 4))}, "vectors"),
    ],
)
def test_refuses_what_does_not_fit(change, says):
    call = {
        "pair": split(torch.zeros(8)),
        "gradient": Gradient(torch.zeros(8)),
        "moments": AdamMoments(torch.zeros(8), torch.zeros(8)),
        "hyper": ADAMW,
    }
    with pytest.raises(ValueError, match=says):
        DeviceKernel().adam(**(call | change))


def test_scales_lie_where_a_gpu_can_read_them(monkeypatch):
    monkeypatch.setattr(DeviceKernel, "widens", True)
    problem = Problem(256, 3, torch.bfloat16, moments=torch.uint8)
    moved = torch.zeros(problem.moments.square.numel() + 1, dtype=torch.uint8)[1:]
    problem.moments = replace(problem.moments, square=moved)
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        problem.update(DeviceKernel(), ADAMW)


def test_momentum_and_its_buffer_come_together():
    pair, gradient = split(torch.zeros(8)), Gradient(torch.zeros(8))
    with pytest.raises(ValueError, match="needs a momentum buffer"):
        DeviceKernel().sgd(pair, gradient, None, SgdHyper(lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match="needs no momentum buffer"):
        DeviceKernel().sgd(pair, gradient, torch.zeros(8), SgdHyper(lr=0.1))
    with pytest.raises(ValueError, match="no variant 'vulkan'"):
        DeviceKernel("vulkan")


def test_offsets_fit_32_bits(monkeypatch):
    monkeypatch.setattr(device_kernel, "_MOST", 99)
    with pytest.raises(ValueError, match="at most 99"):
        Problem(100, 3, torch.bfloat16).update(DeviceKernel(), ADAMW)


def test_without_triton_torch_stands_in_after_one_warning(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(device_kernel.triton_updates, "triton", None)
        device_kernel._compiles.cache_clear()
        with pytest.warns(RuntimeWarning, match="triton is not installed"):
            kernel = DeviceKernel()
        assert kernel.variant == "torch" and DeviceKernel().variant == "torch"
    device_kernel._compiles.cache_clear()


# -- on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("draws", [None, DRAWS], ids=["exact", "rounded"])
@EVERY_WAY
@EVERY_RULE
@EVERY_DTYPE
@EVERY_KIND
def test_triton_gives_the_host_kernels_bits(moments, hyper, dtype, values, draws):
    check(DeviceKernel("triton"), hyper, lambda: Problem(5 * 1024 + 7, 3, dtype, 128, values, moments, draws), "cuda")


@pytest.mark.cuda
@EVERY_RULE
@EVERY_DTYPE
@EVERY_KIND
def test_plain_torch_on_a_gpu_gives_the_host_kernels_bits(hyper, dtype, values):
    check(DeviceKernel("torch"), hyper, lambda: Problem(5 * 1024 + 7, 3, dtype, 128, values), "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("numel", (0, 1, 16, 1023, 1024, 4096))
@pytest.mark.parametrize("offset", (0, 1, 128))
@EVERY_WAY
def test_a_gpu_updates_any_size_at_any_offset(numel, offset, moments):
    def make() -> Problem:
        return Problem(numel, 4, torch.bfloat16, offset, moments=moments)

    for hyper in (ADAMW, SGDS[2]):
        check(DeviceKernel("triton"), hyper, make, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("variant", ("triton", "torch"))
@pytest.mark.parametrize("hyper", (ADAMW, SGDS[2]), ids=str)
def test_a_gpu_reads_a_scale_that_is_there(variant, hyper):
    check(DeviceKernel(variant), hyper, lambda: with_scale_tensor(Problem(3000, 3, torch.float16, 128)), "cuda")


@pytest.mark.cuda
def test_triton_allocates_nothing_does_not_wait_and_keeps_to_its_stream():
    assert available_variants()[0] == "triton"
    kernel, stream = DeviceKernel(), torch.cuda.Stream()
    problem, expected = (with_scale_tensor(Problem(3000, 3, torch.bfloat16)) for _ in range(2))
    expected.update(HostKernel(), ADAMW)
    moved(problem, "cuda")
    warm = with_scale_tensor(Problem(3000, 3, torch.bfloat16))
    moved(warm, "cuda")
    warm.update(kernel, ADAMW)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            problem.update(kernel, ADAMW)
            assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.cuda.max_memory_allocated() == before
    moved(problem, "cpu")
    assert problem.equals(expected)
