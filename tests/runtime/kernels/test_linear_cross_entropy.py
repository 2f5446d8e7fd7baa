"""Projection and cross-entropy in pieces against a float64 reference and the plain loss, bit for bit where promised."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa import linear_cross_entropy as linear_loss
from geminifx.runtime.isa.linear_cross_entropy import BACKWARD, FORWARD, MEAN, SUM, token_chunk, vocabulary_chunk
from geminifx.runtime.memory.tiers import MemoryMeter
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

TOKENS, SIZE, VOCABULARY = 300, 48, 1000

KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
"""Leads straight to the kernel, whose inner operators a dispatch mode then sees."""

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
"""Relative error in norm against float64. Each of a few steps rounds bfloat16 by 3e-3, in the plain loss too."""


def tensors(dtype: torch.dtype, bias: bool = True, spread: float = 0.3) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, SIZE, dtype=torch.float64).to(dtype)
    weight = (torch.randn(VOCABULARY, SIZE, dtype=torch.float64) * spread).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::5] = -100
    return hidden, weight, torch.randn(VOCABULARY, dtype=torch.float64).to(dtype) if bias else None, labels


def plain(hidden, weight, bias, labels, scale=1.0, softcap=0.0, ignore_index=-100, reduction=MEAN):
    logits = F.linear(hidden, weight, bias)
    logits = logits if scale == 1.0 else logits * scale
    logits = softcap * torch.tanh(logits) if softcap else logits
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    kind = {MEAN: "mean", SUM: "sum"}[reduction]
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=kind)


def fused(hidden, weight, bias, labels, scale=1.0, softcap=0.0, ignore_index=-100, reduction=MEAN, chunk=128):
    return FORWARD(hidden, weight, bias, labels, scale, softcap, ignore_index, reduction, chunk)[0]


def gradients(function, hidden, weight, bias, labels, *options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    loss = function(*leaves, *([None] if bias is None else []), labels, *options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(params=[(1, 1), (7, 130), (128, 128), (10_000, 10_000)], ids=str)
def chunks(request, monkeypatch):
    """Tokens and columns per piece: the smallest, ones that do not divide, usual ones, more than there are."""
    monkeypatch.setattr(linear_loss, "vocabulary_chunk", lambda tokens, vocabulary: request.param[1])
    return request.param[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale, softcap", [(1.0, 0.0), (0.3, 0.0), (0.25, 4.0)])
def test_loss_and_gradients_equal_a_float64_reference(dtype, bias, scale, softcap, chunks):
    if chunks == 1 and (dtype, bias) != (torch.float32, True):
        pytest.skip("a piece per token is slow: once")
    made = tensors(dtype, bias)
    for reduction in (MEAN, SUM):
        exact = gradients(plain, *(None if t is None else t.double() for t in made[:3]), made[3], scale, softcap, -100,
                          reduction)  # fmt: skip
        found = gradients(fused, *made, scale, softcap, -100, reduction, chunks)
        for name, a, b in zip(("loss", "hidden", "weight", "bias"), found, exact, strict=False):
            assert error(a, b) < TOLERANCE[dtype], (name, reduction, error(a, b))


@pytest.mark.parametrize("scale, softcap", [(1.0, 0.0), (0.3, 0.0), (0.25, 4.0)])
@pytest.mark.parametrize("spread", [0.02, 2.0])
def test_bfloat16_is_as_near_to_the_truth_as_the_plain_loss(scale, softcap, spread):
    """At most a fifth further away in any gradient; with scale or softcap it is nearer."""
    made = tensors(torch.bfloat16, spread=spread)
    exact = gradients(plain, *(t.double() for t in made[:3]), made[3], scale, softcap)
    ours, theirs = gradients(fused, *made, scale, softcap), gradients(plain, *made, scale, softcap)
    for a, b, c in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert error(a, c) <= 1.2 * error(b, c)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", [MEAN, SUM])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_float32_has_the_loss_bit_for_bit_and_gradients_within_a_few_ulp(bias, reduction, scale):
    made = tensors(torch.float32, bias)
    ours = gradients(fused, *made, scale, 0.0, -100, reduction)
    theirs = gradients(plain, *made, scale, 0.0, -100, reduction)
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        # Of the largest: a gradient is a sum over n tokens or columns in an order that is not ours to choose, two
        # of which differ by about sqrt(n) roundings of its partial sums; n is a few hundred here.
        assert (a - b).abs().max() <= 32 * torch.finfo(torch.float32).eps * b.abs().max()


def test_ignored_tokens_count_for_nothing_whatever_their_number():
    hidden, weight, bias, labels = tensors(torch.float32)
    some = gradients(fused, hidden, weight, bias, torch.where(labels == -100, 7, labels), 1.0, 0.0, 7)
    same = torch.where((labels == -100) | (labels == 7), 7, labels)
    expected = gradients(plain, hidden, weight, bias, same, 1.0, 0.0, 7)
    assert torch.equal(some[0], expected[0]) and error(some[1], expected[1].double()) < 1e-6
    assert some[1][same == 7].count_nonzero() == 0


@pytest.mark.parametrize("reduction", [MEAN, SUM])
def test_all_ignored_is_what_torch_makes_of_it(reduction):
    hidden, weight, bias, _ = tensors(torch.float32)
    labels = torch.full((TOKENS,), -100)
    ours = gradients(fused, hidden, weight, bias, labels, 1.0, 0.0, -100, reduction)
    theirs = gradients(plain, hidden, weight, bias, labels, 1.0, 0.0, -100, reduction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_incoming_gradient_scales_everything():
    made = tensors(torch.float32)
    once = gradients(fused, *made)
    four = gradients(lambda *a: 4.0 * fused(*a), *made)
    assert all(torch.equal(4.0 * a, b) for a, b in zip(once, four, strict=True))


def test_only_what_is_wanted_is_computed():
    hidden, weight, bias, labels = tensors(torch.float32)
    loss, count, normalizer = FORWARD(hidden, weight, bias, labels, 1.0, 0.0, -100, MEAN, 128)
    saved = (torch.ones(()), hidden, weight, bias, labels, count, normalizer, 1.0, 0.0, -100, MEAN, 128)
    whole = BACKWARD(*saved, [True] * 3)
    for mask in itertools.product([False, True], repeat=3):
        for part, full, wanted in zip(BACKWARD(*saved, list(mask)), whole, mask, strict=True):
            assert torch.equal(part, full) if wanted else part.numel() == 0
    assert count == (labels != -100).sum() and normalizer.shape == (2, TOKENS) and loss.dtype == torch.float32


def test_a_label_out_of_range_is_refused():
    hidden, weight, bias, labels = tensors(torch.float32)
    for wrong in (VOCABULARY, -1):
        labels[3] = wrong
        with pytest.raises(IndexError, match="out of bounds"):
            fused(hidden, weight, bias, labels)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hidden": torch.ones(4, 3)}, "expected"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "int64 label per token"),
        ({"labels": torch.zeros(4)}, "int64 label per token"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"reduction": 0}, "reduction=0"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_what_is_no_loss_is_refused(change, says):
    good = {"hidden": torch.ones(4, 2), "weight": torch.ones(5, 2), "bias": torch.ones(5),
            "labels": torch.zeros(4, dtype=torch.int64)}  # fmt: skip
    fused(**good)
    with pytest.raises(ValueError, match=says):
        fused(**{**good, **change})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_schema_fake_kernel_and_autograd_agree(dtype, bias):
    hidden, weight, bias, labels = tensors(dtype, bias)
    hidden, weight = hidden[:20].requires_grad_(), weight[:40].requires_grad_()
    bias, labels = None if bias is None else bias[:40].requires_grad_(), labels[:20] % 40
    torch.library.opcheck(FORWARD, (hidden, weight, bias, labels, 0.5, 3.0, -100, MEAN, 7))
    hidden, weight, bias = (None if t is None else t.detach() for t in (hidden, weight, bias))
    _, count, normalizer = FORWARD(hidden, weight, bias, labels, 0.5, 3.0, -100, MEAN, 7)
    arguments = (torch.ones(()), hidden, weight, bias, labels, count, normalizer, 0.5, 3.0, -100, MEAN, 16)
    torch.library.opcheck(BACKWARD, (*arguments, [True, False, bias is not None]))


def test_gradcheck():
    hidden, weight, bias, labels = tensors(torch.float64)
    leaves = [t.requires_grad_() for t in (hidden[:6], weight[:9], bias[:9])]
    labels = torch.tensor([3, -100, 8, 0, 5, 3])
    assert torch.autograd.gradcheck(lambda *t: fused(*t, labels, 0.7, 2.0, -100, MEAN, 4), leaves)


def test_flops_are_those_of_the_products():
    hidden, weight, bias, labels = tensors(torch.float32)
    with FlopCounterMode(display=False) as counter:
        fused(hidden.requires_grad_(), weight.requires_grad_(), bias, labels).backward()
    assert counter.get_total_flops() == 4 * 2 * TOKENS * SIZE * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_memory_inside_is_at_most_what_is_planned(dtype, softcap):
    hidden, weight, bias, labels = tensors(dtype)
    forward = linear_loss.forward_workspace_bytes(TOKENS, VOCABULARY, 70, dtype)
    backward = linear_loss.backward_workspace_bytes((TOKENS, SIZE), 130, dtype, softcap)
    with torch.no_grad():
        with MemoryMeter() as meter:
            results = FORWARD.redispatch(KERNEL, hidden, weight, bias, labels, 0.5, softcap, -100, MEAN, 70)
            assert meter.peak_bytes <= forward + sum(t.nbytes for t in results)
            assert meter.peak_bytes >= 0.8 * forward, "and not much less"
        saved = (torch.ones(()), hidden, weight, bias, labels, *results[1:], 0.5, softcap, -100, MEAN, 130)
        with MemoryMeter() as meter:
            results = BACKWARD.redispatch(KERNEL, *saved, [True] * 3)
            assert meter.peak_bytes <= backward + sum(t.nbytes for t in results)
            assert meter.peak_bytes >= 0.6 * backward


@pytest.mark.parametrize("tokens, vocabulary", [(1, 10), (8192, 50_272), (100_000, 128_256), (1024, 8192)])
def test_pieces_are_small_but_not_too_small(tokens, vocabulary):
    for size, width, length in (
        (token_chunk(tokens, vocabulary), vocabulary, tokens),
        (vocabulary_chunk(tokens, vocabulary), tokens, vocabulary),
    ):
        assert size >= 256 and size % 128 == 0
        assert size == 256 or 4 * size * width <= linear_loss.PIECE_BYTES
        assert size <= max(256, length / 8 + 1)
