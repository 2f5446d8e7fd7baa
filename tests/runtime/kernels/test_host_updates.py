"""The host kernel: every variant gives the same bits, and they are those of torch.optim."""

import ctypes
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from geminifx.runtime.kernels import host_updates as host_kernel
from geminifx.runtime.kernels import reference_updates
from geminifx.runtime.kernels.host_updates import HostKernel, available_variants
from geminifx.runtime.kernels.split_pairs import PIECE, SplitPair, join, split
from geminifx.runtime.kernels.update_rules import AdamHyper, AdamMoments, Gradient, SgdHyper
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from updates import ADAMS, ADAMW, DRAWS, DTYPES, RULES, SGDS, SPECIAL, Problem, any_bits, floats, same, same_pair

# -- split pairs ---------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32) | st.integers(0, 2**32 - 1).map(lambda bits: float(floats([bits])))))
def test_a_split_pair_is_the_master(values):
    check_pair(torch.tensor(values, dtype=torch.float32))


def test_every_remainder_and_every_upper_half():
    check_pair(floats(list(SPECIAL)))
    for upper in (0x0000, 0x3F80, 0x3F81, 0x7F7F, 0x8000, 0xBF81, 0xFF7F):
        check_pair(floats([upper << 16 | lower for lower in range(1 << 16)]))
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0xFFFF):
        check_pair(floats([upper << 16 | lower for upper in range(1 << 16)]))


def check_pair(master: Tensor) -> None:
    pair = split(master)
    nan = master.isnan()
    again = join(pair)
    assert torch.equal(again.view(torch.int32)[~nan], master.view(torch.int32)[~nan])
    assert torch.equal(again.isnan(), nan) and torch.equal(pair.hi.isnan(), nan)
    tie = master.view(torch.int32) & 0xFFFF == 0x8000
    usual = ~nan & ~tie
    assert torch.equal(pair.hi[usual], master.bfloat16()[usual])


def test_pairs_keep_shape_and_write_where_told():
    master = torch.randn(3, PIECE, dtype=torch.float32)
    pair = split(master)
    assert pair.hi.shape == pair.lo.shape == master.shape
    out = SplitPair(torch.empty_like(pair.hi), torch.empty_like(pair.lo))
    assert split(master, out) is out and same_pair(out, pair)
    target = torch.empty_like(master)
    assert join(pair, target) is target and torch.equal(target, master)
    assert torch.equal(join(split(master.t())), master.t())
    assert join(split(torch.tensor(1.5))).item() == 1.5


def test_pairs_refuse_other_dtypes():
    with pytest.raises(ValueError, match="float64"):
        split(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="bfloat16 and int16"):
        SplitPair(torch.zeros(3), torch.zeros(3, dtype=torch.int16))
    with pytest.raises(ValueError, match="one of the two"):
        SplitPair(torch.zeros(3).bfloat16(), None)
    with pytest.raises(ValueError, match="contiguous"):
        join(split(torch.zeros(3)), torch.zeros(6)[::2])
    with pytest.raises(ValueError, match="shape"):
        split(torch.zeros(3), split(torch.zeros(4)))


# -- one arithmetic ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    numel=st.integers(0, 200),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    hyper=st.sampled_from(RULES),
    offset=st.integers(0, 3),
    draws=st.sampled_from((None, DRAWS)),
)
def test_variants_agree(numel, seed, dtype, hyper, offset, draws):
    expected = Problem(numel, seed, dtype, draws=draws)
    expected.update(HostKernel("torch"), hyper)
    for variant in available_variants():
        found = Problem(numel, seed, dtype, offset, draws=draws)
        found.update(HostKernel(variant), hyper)
        assert found.equals(expected), variant


@pytest.mark.slow
@pytest.mark.parametrize("hyper", RULES, ids=str)
@pytest.mark.parametrize("draws", [None, DRAWS], ids=["exact", "rounded"])
def test_threads_pieces_and_bulk_agree(hyper, draws):
    expected = Problem(PIECE + 77, 5, torch.bfloat16, draws=draws)
    expected.update(HostKernel("torch"), hyper)
    for variant in available_variants():
        for threads in (1, 5):
            found = Problem(PIECE + 77, 5, torch.bfloat16, offset=1, draws=draws)
            found.update(HostKernel(variant), hyper, threads)
            assert found.equals(expected), (variant, threads)


@pytest.mark.parametrize("hyper", RULES, ids=str)
def test_the_fallback_needs_no_fused_torch(hyper, monkeypatch):
    expected, found = Problem(5000, 1, torch.bfloat16), Problem(5000, 1, torch.bfloat16)
    expected.update(HostKernel(), hyper)
    monkeypatch.setattr(reference_updates, "torch_fuses", lambda: False)
    found.update(HostKernel("torch"), hyper)
    assert found.equals(expected)


@pytest.mark.parametrize("variant", (None, "torch"))
@pytest.mark.parametrize("hyper", (ADAMS[0], SGDS[0]), ids=str)
def test_a_scale_may_be_a_tensor(variant, hyper):
    expected, found = Problem(100, 2, torch.bfloat16), Problem(100, 2, torch.bfloat16)
    expected.update(HostKernel(variant), hyper)
    scale = found.gradient.scale
    for dtype in (torch.float32, torch.float64):
        found = Problem(100, 2, torch.bfloat16)
        found.gradient = Gradient(found.gradient.values, torch.tensor(scale, dtype=dtype))
        found.update(HostKernel(variant), hyper)
        assert found.equals(expected)
    with pytest.raises(ValueError, match="without dimensions"):
        Gradient(found.gradient.values, torch.ones(1))
    with pytest.raises(ValueError, match="float16"):
        Gradient(found.gradient.values, torch.tensor(1.0, dtype=torch.float16))


def test_fused_multiply_add_rounds_once():
    libm = ctypes.CDLL(None).fmaf
    libm.restype, libm.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    near_tie = floats([0x3F800001, 0x3F800001, 0x24800001])  # 1 + 2^-23, and a third of an ulp or less
    a = torch.cat([any_bits(3000, 1), near_tie[:1], near_tie[:1]])
    b = torch.cat([any_bits(3000, 2), near_tie[1:2], -near_tie[1:2]])
    c = torch.cat([any_bits(3000, 3), near_tie[2:], -near_tie[2:]])
    exact = torch.tensor([libm(*row) for row in torch.stack([a, b, c], 1).tolist()], dtype=torch.float32)
    assert same(reference_updates.fused_multiply_add(a, b, c), exact)


def test_a_callers_floating_point_mode_does_not_matter():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    torch.set_flush_denormal(False)
    expected, found = Problem(500, 8, torch.float32), Problem(500, 8, torch.float32)
    expected.update(HostKernel(), ADAMW)
    torch.set_flush_denormal(True)
    try:
        found.update(HostKernel(), ADAMW)
        assert torch.tensor([1e-40]).mul(1.0).item() == 0  # and the caller's own mode is kept
    finally:
        torch.set_flush_denormal(False)
    assert found.equals(expected)


@settings(max_examples=60)
@given(
    numel=st.integers(0, 200),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from((1.0, 2.0**-10, 0.3)),
    fresh=st.booleans(),
    offset=st.integers(0, 3),
)
def test_sums_agree(numel, seed, dtype, scale, fresh, offset):
    start, values = any_bits(numel + offset, seed)[offset:], any_bits(numel + offset, seed + 1).to(dtype)[offset:]
    found = {}
    for variant in available_variants():
        found[variant] = start.clone()
        HostKernel(variant).add(found[variant], Gradient(values, scale), 2, fresh=fresh)
    expected = values.float() * scale if fresh else reference_updates._add_exactly(start, values.float(), scale)
    for variant, total in found.items():
        assert same(total, expected), variant


@pytest.mark.parametrize("variant", ("avx512", "avx2", "plain", "torch"))
def test_sums_are_torch_s(variant):
    values, total = gradients(1), gradients(2).float()
    expected = total.add(values, alpha=0.3) if reference_updates.torch_fuses() else None
    kernel_or_skip(variant).add(total, Gradient(values, 0.3), 5, fresh=False)
    assert expected is None or torch.equal(total, expected)


@pytest.mark.parametrize(
    "total, values, threads, message",
    [
        (torch.zeros(4), torch.zeros(3), 1, "of the same size"),
        (torch.zeros(8)[::2], torch.zeros(4), 1, "contiguous"),
        (torch.zeros(4, dtype=torch.float64), torch.zeros(4), 1, "to torch.float64"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), 1, "not torch.int64"),
        (torch.zeros(4), torch.zeros(4), 0, "at least one thread"),
    ],
)
def test_sums_that_would_be_read_wrong_are_refused(total, values, threads, message):
    with pytest.raises(ValueError, match=message):
        HostKernel().add(total, Gradient(values), threads, fresh=False)


# -- torch.optim ---------------------------------------------------------------------------------------------

STEPS, NUMEL = 50, 4096 + 13
fused = pytest.mark.skipif(not reference_updates.torch_fuses(), reason="torch itself rounds twice on this CPU")
EVERY_VARIANT = pytest.mark.parametrize("variant", ("avx512", "avx2", "plain", "torch"))


def kernel_or_skip(variant: str) -> HostKernel:
    if variant not in available_variants():
        pytest.skip(f"this CPU has no {variant}")
    return HostKernel(variant)


def gradients(step: int) -> Tensor:
    """Gradients of many sizes, some zero."""
    source = torch.Generator().manual_seed(step)
    sizes = 10.0 ** torch.randint(-12, 3, (NUMEL,), generator=source)
    return (torch.randn(NUMEL, generator=source) * sizes * (torch.arange(NUMEL) % 17 != 0)).bfloat16()


def optimizer_and_master(kind: type[torch.optim.Optimizer], **options: object) -> tuple[torch.optim.Optimizer, Tensor]:
    master = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return kind([master], foreach=False, **options), master


def exact_root(tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.sqrt(tensor.numpy()))


def run_adam(kernel: HostKernel, decoupled: bool) -> tuple[SplitPair, Tensor, AdamMoments, dict]:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer, master = optimizer_and_master(kind, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=False)
    pair, moments = split(master), AdamMoments(torch.zeros(NUMEL), torch.zeros(NUMEL))
    for step in range(1, STEPS + 1):
        master.grad = gradients(step).float()
        optimizer.step()
        kernel.adam(pair, Gradient(gradients(step)), moments,
                    AdamHyper(1e-2, 0.9, 0.95, 1e-8, 0.1, step, decoupled), 1)  # fmt: skip
    return pair, master.detach(), moments, optimizer.state[master]


@fused
@EVERY_VARIANT
@pytest.mark.parametrize("decoupled", (True, False))
def test_adam_is_torchs_with_an_exact_root(variant, decoupled, monkeypatch):
    kernel = kernel_or_skip(variant)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "sqrt", exact_root)
        pair, master, moments, state = run_adam(kernel, decoupled)
    assert torch.equal(join(pair), master)
    assert torch.equal(moments.mean, state["exp_avg"]) and torch.equal(moments.square, state["exp_avg_sq"])


@fused
@pytest.mark.parametrize("decoupled", (True, False))
def test_adam_differs_from_torchs_by_its_root_alone(decoupled):
    """The root's last unit moves each update by 2^-23 of itself and may turn one rounding of the weight."""
    pair, master, moments, state = run_adam(HostKernel(), decoupled)
    ulp = torch.nextafter(master.abs(), torch.tensor(math.inf)) - master.abs()
    update = 2 * 1e-2  # at most twice the rate with these betas' corrections
    bound = STEPS * (ulp.maximum(torch.tensor(2.0**-26)) + update * 2.0**-22)
    difference = (join(pair) - master).abs()
    assert (difference <= bound).all()
    assert (difference / ulp).median() <= 1
    if decoupled:  # the moments never see the weights
        assert torch.equal(moments.mean, state["exp_avg"]) and torch.equal(moments.square, state["exp_avg_sq"])


@fused
@EVERY_VARIANT
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_sgd_is_torchs(variant, options):
    kernel = kernel_or_skip(variant)
    optimizer, master = optimizer_and_master(torch.optim.SGD, lr=1e-2, fused=False, **options)
    pair, buffer = split(master), torch.full((NUMEL,), math.nan) if "momentum" in options else None
    for step in range(1, STEPS + 1):
        master.grad = gradients(step).float() * 0.5
        optimizer.step()
        hyper = SgdHyper(lr=1e-2, first=step == 1, **options)
        kernel.sgd(pair, Gradient(gradients(step), 0.5), buffer, hyper, 1)
    assert torch.equal(join(pair), master)
    if buffer is not None:
        assert torch.equal(buffer, optimizer.state[master]["momentum_buffer"])


@EVERY_VARIANT
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_gradients_that_are_not_finite_spread_as_in_torch(variant, bad):
    kernel = kernel_or_skip(variant)
    optimizer, master = optimizer_and_master(torch.optim.AdamW, lr=1e-2, fused=False)
    pair, moments = split(master), AdamMoments(torch.zeros(NUMEL), torch.zeros(NUMEL))
    grad = gradients(1)
    grad[::5] = bad
    master.grad = grad.float()
    optimizer.step()
    kernel.adam(pair, Gradient(grad), moments, AdamHyper(1e-2, 0.9, 0.999, 1e-8, 0.01, 1), 1)
    assert torch.equal(join(pair).isnan(), master.isnan()) and master.isnan()[::5].all()
    assert torch.equal(pair.hi.isnan(), master.isnan())
    assert same(moments.square, optimizer.state[master]["exp_avg_sq"])


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threads": 0}, "thread"),
        ({"gradient": Gradient(torch.zeros(9))}, "9"),
        ({"gradient": Gradient(torch.zeros(8, dtype=torch.float64))}, "float64"),
        ({"gradient": Gradient(torch.zeros(16)[::2])}, "strides"),
        ({"moments": AdamMoments(torch.zeros(8), torch.zeros(8).bfloat16())}, "float32"),
        ({"moments": AdamMoments(torch.zeros(8), torch.zeros(8, device="meta"))}, "meta"),
    ],
)
@pytest.mark.parametrize("variant", (None, "torch"))
def test_refuses_what_does_not_fit(variant, change, says):
    call = {
        "pair": split(torch.zeros(8)),
        "gradient": Gradient(torch.zeros(8)),
        "moments": AdamMoments(torch.zeros(8), torch.zeros(8)),
        "hyper": ADAMW,
        "threads": 1,
    }
    with pytest.raises(ValueError, match=says):
        HostKernel(variant).adam(**(call | change))


def test_momentum_and_its_buffer_come_together():
    pair, gradient = split(torch.zeros(8)), Gradient(torch.zeros(8))
    with pytest.raises(ValueError, match="needs a momentum buffer"):
        HostKernel().sgd(pair, gradient, None, SgdHyper(lr=0.1, momentum=0.9), 1)
    with pytest.raises(ValueError, match="needs no momentum buffer"):
        HostKernel().sgd(pair, gradient, torch.zeros(8), SgdHyper(lr=0.1), 1)
    with pytest.raises(ValueError, match="numbered from 1"):
        replace(ADAMW, step=0)
    with pytest.raises(ValueError, match="no variant 'sse9'"):
        HostKernel("sse9")


def test_without_a_compiler_torch_stands_in_after_one_warning(monkeypatch):
    expected, found = Problem(100, 3, torch.bfloat16), Problem(100, 3, torch.bfloat16)
    expected.update(HostKernel(), ADAMW)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CXX", raising=False)
        host_kernel._load_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="none found.*install g"):
            kernel = HostKernel()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert available_variants() == ("torch",)
        assert kernel.variant == "torch"
        found.update(kernel, ADAMW)
    host_kernel._load_once.cache_clear()
    assert found.equals(expected)
