"""The attention operator against a float64 reference, torch's own attention, and its fake kernel."""

import itertools

import pytest
import torch
from attention_reference import TOLERANCE, errors, padding, reference, tensors
from geminifx.runtime.isa.attention import attention, attention_flops
from geminifx.runtime.kernels import attention_backends as attention_kernels
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

OP = torch.ops.geminifx.attention.default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal, window", [(False, 0), (True, 0), (True, 3), (True, 50)])
@pytest.mark.parametrize("kind", ["none", "left", "right", "whole row"])
def test_forward_and_gradients_equal_a_float64_reference(dtype, causal, window, kind):
    torch.manual_seed(0)
    lengths = [(37, 37), (5, 9), (9, 5), (1, 1), (1, 7)]
    for heads, (queries, keys), scale in itertools.product((4, 2, 1), lengths, (0.25, 1.3)):
        mine = tensors((2, 4, queries, 16), (2, heads, keys, 16), dtype)
        problem = {"scale": scale, "causal": causal, "window": window}
        for name, error in errors(mine, padding(kind, 2, keys), problem).items():
            assert error < TOLERANCE[dtype], (name, heads, queries, keys, scale, error)


def test_values_may_have_another_head_size():
    query, key, _ = tensors((2, 4, 6, 8), (2, 2, 6, 8), torch.float64)
    value = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, scale=0.3, causal=True), (query, key, value))


def test_rows_without_keys_are_zero_and_pass_no_gradient():
    mine = tensors((2, 2, 6, 8), (2, 2, 6, 8))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :3] = False
    for window in (0, 2):
        out = attention(*mine, key_mask=mask, scale=0.3, causal=True, window=window)
        assert out[0, :, :3].eq(0).all() and out[0, :, 3:].ne(0).any()
        grads = torch.autograd.grad(out.sum(), mine)
        assert all(g.isfinite().all() for g in grads) and grads[0][0, :, :3].eq(0).all()


@pytest.mark.parametrize("heads", [4, 2])
def test_seeded_dropout_is_the_one_of_torch_on_cpu(heads):
    mine = tensors((2, 4, 8, 16), (2, heads, 8, 16))

    def torch_own(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=0.3, scale=0.2, enable_gqa=heads != 4
        )

    def ours(query, key, value):
        return attention(query, key, value, scale=0.2, causal=True, dropout=0.3)

    results = []
    for function in (torch_own, ours):
        torch.manual_seed(3)
        out = function(*mine)
        # Drawing in between must not disturb what backward draws again.
        after = torch.rand(4)
        results.append((out, after, *torch.autograd.grad(out.sin().sum(), mine)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert attention(*mine, scale=0.2, causal=True, dropout=1.0).eq(0).all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked, causal, window", [(0, 1, 0), (1, 0, 0), (1, 1, 3)])
def test_the_library_checks_hold(dropout, masked, causal, window):
    mine = tensors((2, 4, 8, 16), (2, 2, 8, 16))
    mask = padding("left", 2, 8) if masked else None
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # The remaining check compares two runs, which differ where both draw.
    checks += [] if dropout else ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(OP, (*mine, mask, 0.25, bool(causal), dropout, window), test_utils=checks)


@pytest.mark.parametrize("shape", [(2, 4, 8, 16), (1, 4, 1, 16), (2, 1, 8, 16), (1, 1, 1, 8)])
@pytest.mark.parametrize("dropout, window, masked", [(0.0, 0, 0), (0.0, 0, 1), (0.2, 0, 0), (0.0, 3, 1)])
def test_fake_sizes_strides_and_types_equal_the_real_ones(shape, dropout, window, masked):
    mine = [t.detach() for t in tensors(shape, shape)]
    mask = padding("left", shape[0], shape[2]) if masked else None
    options = (0.25, True, dropout, window)
    backward = torch.ops.geminifx.attention_backward

    def both(grad, query, key, value, mask):
        forward = OP(query, key, value, mask, *options)
        return (*forward, *backward(grad, query, key, value, mask, *forward, *options))

    real = both(mine[0], *mine, mask)
    fake_mode = FakeTensorMode()
    with fake_mode:
        lifted = [None if t is None else fake_mode.from_tensor(t) for t in (mine[0], *mine, mask)]
        fake = both(*lifted)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_the_result_is_ready_for_the_output_projection():
    out = attention(*tensors((2, 4, 8, 16), (2, 4, 8, 16)), scale=0.25, causal=True)
    assert out.transpose(1, 2).is_contiguous()


def test_only_the_output_is_differentiable():
    out, logsumexp, rng = OP(*tensors((2, 4, 8, 16), (2, 4, 8, 16)), None, 0.25, True, 0.0, 0)
    assert out.requires_grad and not logsumexp.requires_grad and not rng.requires_grad
    assert logsumexp.dtype == torch.float32 and rng.numel() == 0


def test_autocast_casts_as_torch_does():
    mine = tensors((2, 4, 8, 16), (2, 4, 8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*mine, scale=0.25, causal=True).dtype == torch.bfloat16


@pytest.mark.parametrize("queries, keys, window", [(7, 7, 0), (7, 4, 3), (7, 11, 9), (7, 4, 0), (3, 9, 2)])
def test_flops_count_visible_pairs(queries, keys, window):
    rows, columns = torch.arange(queries)[:, None], torch.arange(keys)
    seen = (columns <= rows) & ((columns > rows - window) | (window == 0))
    shapes = ((2, 4, queries, 8), (2, 2, keys, 6))
    pairs = 2 * 4 * int(seen.sum())
    assert attention_flops(*shapes, causal=True, window=window) == 2 * pairs * 14
    assert attention_flops(*shapes, causal=True, window=window, backward=True) == 2 * pairs * (3 * 8 + 2 * 6)
    assert attention_flops(*shapes, causal=False) == 2 * 8 * queries * keys * 14


def test_torch_counts_these_flops_too():
    mine = tensors((2, 4, 8, 16), (2, 2, 8, 16))
    with FlopCounterMode(display=False) as counter:
        attention(*mine, scale=0.25, causal=True).sum().backward()
    shapes = ((2, 4, 8, 16), (2, 2, 8, 16))
    forward = attention_flops(*shapes, causal=True)
    assert counter.get_total_flops() == forward + attention_flops(*shapes, causal=True, backward=True)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"window": 2, "causal": False}, "needs causal=True"),
        ({"dropout": 1.5}, "dropout must lie"),
        ({"key_mask": torch.ones(2, 8)}, "key_mask must be bool"),
        ({"key": torch.zeros(2, 3, 8, 16), "value": torch.zeros(2, 3, 8, 16)}, "multiple of key heads"),
        ({"value": torch.zeros(2, 4, 8, 16, dtype=torch.float64)}, "dtypes differ"),
        ({"query": torch.zeros(4, 8, 16)}, "batch, heads, length"),
        ({"query": torch.zeros(2, 4, 8, 8)}, "must agree"),
    ],
)
def test_errors_name_what_is_wrong(change, words):
    zeros = torch.zeros(2, 4, 8, 16)
    arguments = {"query": zeros, "key": zeros, "value": zeros, "scale": 1.0, "causal": True, **change}
    with pytest.raises(ValueError, match=words):
        attention(**arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal, window", [(False, 0), (True, 0), (True, 20)])
@pytest.mark.parametrize("kind", ["none", "left", "right", "whole row"])
@pytest.mark.parametrize("queries, keys", [(64, 64), (37, 53), (53, 37), (128, 128), (200, 131)])
def test_cuda_kernels_equal_the_reference(dtype, causal, window, kind, queries, keys):
    torch.manual_seed(0)
    for heads, size in itertools.product((4, 2), (64, 12)):
        mine = [
            t.detach().cuda().requires_grad_() for t in tensors((2, 4, queries, size), (2, heads, keys, size), dtype)
        ]
        mask = padding(kind, 2, keys)
        on_device = None if mask is None else mask.cuda()
        out = attention(*mine, key_mask=on_device, scale=0.2, causal=causal, window=window)
        grad = torch.randn_like(out)
        exact = tuple(t.detach().cpu().double().requires_grad_() for t in mine)
        expected = reference(*exact, mask, 0.2, causal, window)
        found = (out, *torch.autograd.grad(out, mine, grad))
        wanted = (expected, *torch.autograd.grad(expected, exact, grad.cpu().double()))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=0.02, atol=0.05 if dtype.itemsize == 2 else 5e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries, keys, causal", [(128, 128, True), (333, 333, True), (200, 131, False)])
def test_cudnn_and_flash_compute_the_same(size, dtype, queries, keys, causal):
    """As views of one projection, the way models hand them over; each route where this GPU has it."""
    if torch.cuda.get_device_capability()[0] not in attention_kernels.CUDNN_ON:
        pytest.skip("cuDNN's kernels are not used on this GPU")
    torch.manual_seed(0)
    length = max(queries, keys)
    fused = torch.randn(2, length, 3, 4, size, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4)
    mine = fused[0][:, :, :queries], fused[1][:, :, :keys], fused[2][:, :, :keys]
    problem = attention_kernels.Problem(size**-0.5, causal, 0.0, 0)
    assert attention_kernels.route(*mine, None, problem) == "cudnn"
    grad = torch.randn(2, queries, 4, size, device="cuda", dtype=dtype).transpose(1, 2)
    results = []
    for name in ("cudnn", "flash"):
        out, logsumexp, _ = attention_kernels.FORWARD[name](*mine, None, problem)
        saved = attention_kernels.Saved(out, logsumexp, torch.zeros(0, dtype=torch.uint8, device="cuda"))
        results.append((out, logsumexp, *attention_kernels.BACKWARD[name](grad, mine, None, saved, problem)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("size, masked", [(64, False), (64, True), (12, False)])
def test_cuda_backward_repeats_the_dropout_of_forward(size, masked):
    """With values of one, an output is the sum of the kept weights; the gradient must see the same ones."""
    query, key, _ = tensors((2, 4, 64, size), (2, 4, 64, size), torch.bfloat16, grad=False)
    query, key = query.cuda(), key.cuda()
    value = torch.ones_like(key).requires_grad_()
    mask = torch.ones(2, 64, dtype=torch.bool, device="cuda") if masked else None
    out = attention(query, key, value, key_mask=mask, scale=0.1, causal=False, dropout=0.5)
    (grad,) = torch.autograd.grad(out.float().sum(), value)
    torch.testing.assert_close(grad.float().sum(), out.float().sum(), rtol=0.01, atol=0.5)


@pytest.mark.parametrize(
    "change, name",
    [
        ({}, "cudnn"),
        ({"capability": (10, 0)}, "cudnn"),
        ({"causal": False, "keys": 200}, "cudnn"),
        ({"capability": (8, 0)}, "flash"),
        ({"capability": (12, 0)}, "flash"),
        ({"dropout": 0.1}, "flash"),
        ({"window": 64}, "flash"),
        ({"size": 256}, "flash"),
        ({"length": 64}, "flash"),
        ({"deterministic": True}, "flash"),
        ({"switched_off": True}, "flash"),
        ({"keys": 200}, "efficient"),
        ({"masked": True}, "efficient"),
        ({"dtype": torch.float32}, "efficient"),
        ({"size": 12}, "plain"),
        ({"capability": (7, 5)}, "efficient"),
    ],
    ids=str,
)
def test_the_route_on_a_gpu(monkeypatch, change, name):
    given = {
        "capability": (9, 0), "causal": True, "dropout": 0.0, "window": 0, "size": 64, "length": 128, "keys": 0,
        "dtype": torch.bfloat16, "masked": False, "deterministic": False, "switched_off": False, **change,
    }  # fmt: skip
    monkeypatch.setattr(attention_kernels, "major_capability", lambda device: given["capability"][0])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: given["deterministic"])
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: not given["switched_off"])
    with FakeTensorMode():
        shape = (2, 4, given["keys"] or given["length"], given["size"])
        query = torch.empty(2, 4, given["length"], given["size"], dtype=given["dtype"], device="cuda")
        key = torch.empty(shape, dtype=given["dtype"], device="cuda")
        mask = torch.empty(2, shape[2], dtype=torch.bool, device="cuda") if given["masked"] else None
        problem = attention_kernels.Problem(0.1, given["causal"], given["dropout"], given["window"])
        assert attention_kernels.route(query, key, key, mask, problem) == name


def test_every_route_has_both_directions():
    assert attention_kernels.FORWARD.keys() == attention_kernels.BACKWARD.keys()


@pytest.mark.parametrize(
    "name, dropout, window",
    [("cudnn", 0.0, 0), *((n, d, w) for n in ("flash", "efficient") for d in (0.0, 0.1) for w in (0, 5))],
)
def test_cuda_routes_fit_the_schemas_of_this_torch(name, dropout, window):
    """On meta tensors: argument order, optional arguments and the shapes that come back; no numbers."""
    mine = tuple(torch.empty(2, 4, 64, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    problem = attention_kernels.Problem(0.1, True, dropout, window)
    out, logsumexp, drawn = attention_kernels.FORWARD[name](*mine, None, problem)
    assert out.shape == mine[0].shape and logsumexp.shape == (2, 4, 64)
    assert drawn is None or drawn.numel() * drawn.element_size() == 16
    # The efficient kernel reads its random state on the host.
    device = "cpu" if name == "efficient" else "meta"
    rng = torch.zeros(attention_kernels.RNG_BYTES, dtype=torch.uint8, device=device)
    saved = attention_kernels.Saved(out, logsumexp, rng)
    grads = attention_kernels.BACKWARD[name](out, mine, None, saved, problem)
    assert all(grad.shape == t.shape for grad, t in zip(grads, mine, strict=True))
