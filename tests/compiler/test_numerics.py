"""Compiled training is plain PyTorch's: losses, every gradient, parameters and buffers, in any loop.

The reference is the same model, seed, batches and loop without `compile`. Comparison is bit by bit wherever
the same kernels run in the same order. Where they do not, which is torch's attention against our operator
for grouped heads, the bound is stated with `close`.
"""

from collections.abc import Callable
from itertools import product

import geminifx
import pytest
import torch
import torch.nn.functional as F
from shared_captures import shared_captures
from torch import Tensor, nn
from zoo import (
    BLOCKS,
    CASES,
    CNN,
    GPT2,
    LLAMA,
    MLP,
    OPT,
    OPTIMIZERS,
    Blocks,
    Case,
    Trace,
    compiled,
    cross_entropy,
    gpt2,
    next_token,
    opt,
    smallest_budget,
    state_bytes,
    tokens,
    train,
)

PLACEMENTS = ("cpu", "cuda", "auto")
RECOMPUTE = ("none", "all")
QUICK = (("auto", "none"),)
"""What `make test` runs of these."""

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
everywhere = pytest.mark.parametrize("placement", PLACEMENTS)


def close(found: Tensor, expected: Tensor, scale: float) -> bool:
    """Whether two sums of the same few hundred fp32 terms agree, whatever the order of the terms.

    A sum of n terms rounds n times, each time by at most eps = 2^-24 of the running sum: with n below 256
    that is 2^-16 of the largest such sum, here taken to be `scale`.
    """
    return (found - expected).abs().max().item() <= scale * 2**-16


def assert_same(case: Case, found: Trace, expected: Trace) -> None:
    for step, (a, b) in enumerate(zip(found.losses, expected.losses, strict=True)):
        assert torch.equal(a, b) if case.exact else close(a, b, b.item()), f"loss of step {step}: {a} and {b}"
    for step, (a, b) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name] is None) == (b[name] is None), f"step {step}, {name}: a gradient or none"
            if a[name] is None:
                continue
            # Behind an update the parameters differ by as much as assert_same_state allows them, and gradients follow.
            scale = max(g.abs().max().item() for g in b.values() if g is not None) * (64 if step else 1)
            same = torch.equal(a[name], b[name]) if case.exact else close(a[name], b[name], scale)
            assert same, f"step {step}, gradient of {name}: {(a[name] - b[name]).abs().max()}"


def assert_same_state(case: Case, found: nn.Module, expected: nn.Module, path: float) -> None:
    """`path` is how far a parameter may have come: an optimizer may amplify a gradient's rounding (AdamW
    divides by its size), but a thousandth of the way says that every step went in the same direction."""
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if case.exact else close(a[name], b[name], 65.536 * path)
        assert same, f"{name}: {(a[name] - b[name]).abs().max()} apart"


# -- every model, policy and recompute choice --------------------------------------------------------------


EVERY_WAY = [
    pytest.param(*way, marks=[] if way in QUICK else pytest.mark.slow) for way in product(PLACEMENTS, RECOMPUTE)
]


@pytest.mark.parametrize(("placement", "recompute"), EVERY_WAY)
@by_name
def test_five_steps_of_every_optimizer(case: Case, placement: str, recompute: str) -> None:
    plain = case.seeded()
    state = state_bytes(plain)
    ways = {"recompute": recompute, "microbatches": 1}
    # "cuda" keeps the whole state on the device; the others get less than it takes.
    budget = 2 * state if placement == "cuda" else (smallest_budget(case, **ways) + state) // 2
    assert (budget < state) is (placement != "cuda")
    ours = compiled(case, device_budget=budget, placement=placement, **ways)
    for optimizer in OPTIMIZERS:  # one after the other, each from where the last one ended
        assert_same(case, train(case, ours, optimizer), train(case, plain, optimizer))
        assert_same_state(case, ours, plain, path=5 * 1e-2)
    assert ours.stats.device_peak_bytes <= ours.plan.peak_bytes <= budget
    assert bool(ours.plan.recompute) is (recompute == "all")


@pytest.mark.parametrize("case", [OPT, LLAMA], ids=lambda case: case.name)
def test_padded_batches(case: Case) -> None:
    batch = tokens(4, 8)
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[1, 5:] = mask[3, 2:] = 0
    batch = {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
    padded = Case(case.name, case.build, lambda seed=0: batch, exact=False)
    assert_same(
        padded, train(padded, compiled(padded, placement="cpu"), steps=2), train(padded, padded.seeded(), steps=2)
    )


# -- every loop --------------------------------------------------------------------------------------------

Loop = Callable[[nn.Module], Trace]


def accumulate(microbatches: int) -> Loop:
    def loop(model: nn.Module) -> Trace:
        trace, optimizer = Trace(), torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(2):
            for micro in range(microbatches):
                loss = next_token(model, tokens(seed=10 * step + micro)) / microbatches
                loss.backward()
                trace.record(model, loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step == 1)
        return trace

    return loop


def clip(model: nn.Module) -> Trace:
    trace, optimizer = Trace(), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        next_token(model, tokens(seed=step)).backward()
        trace.record(model, torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
    return trace


def schedule(model: nn.Module) -> Trace:
    trace, optimizer = Trace(), torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
    for step in range(4):
        optimizer.zero_grad()
        loss = next_token(model, tokens(seed=step))
        loss.backward()
        trace.record(model, loss)
        optimizer.step()
        scheduler.step()
    return trace


def parameter_groups(model: nn.Module) -> Trace:
    trace = Trace()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(3):
        model.zero_grad(set_to_none=False)
        loss = next_token(model, tokens(seed=step))
        loss.backward()
        trace.record(model, loss)
        optimizer.step()
    return trace


def evaluate_between(model: nn.Module) -> Trace:
    trace, optimizer = Trace(), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        model.eval()
        with torch.no_grad():
            trace.losses.append(next_token(model, tokens(4, 8, seed=100)))
        trace.losses.append(next_token(model, tokens(4, 8, seed=100)).detach())  # eval() with a graph
        model.train()
        with torch.no_grad():
            trace.losses.append(next_token(model, tokens(seed=101)))
        optimizer.zero_grad()
        loss = next_token(model, tokens(seed=step))
        loss.backward()
        trace.record(model, loss)
        optimizer.step()
    return trace


def two_forwards(model: nn.Module) -> Trace:
    """A preference loss: chosen and rejected are compared before one backward."""
    trace, optimizer = Trace(), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        chosen, rejected = (next_token(model, tokens(seed=2 * step + i)) for i in (0, 1))
        loss = F.softplus(chosen - rejected)
        loss.backward()
        trace.record(model, loss)
        optimizer.step()
    return trace


def forwards_without_backward(model: nn.Module) -> Trace:
    next_token(model, tokens(seed=7))
    kept = next_token(model, tokens(seed=8))
    trace = clip(model)
    del kept
    return trace


def frozen(model: nn.Module) -> Trace:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.1" not in name)
    return clip(model)


def frozen_and_thawed(model: nn.Module) -> Trace:
    trace = clip(model)
    for requires_grad in (False, True):
        model.blocks[0].requires_grad_(requires_grad)  # type: ignore[index]
        model.zero_grad()
        loss = next_token(model, tokens(seed=5))
        loss.backward()
        trace.record(model, loss)
    return trace


def gradient_from_outside(model: nn.Module) -> Trace:
    trace = Trace()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    loss = next_token(model, tokens())
    loss.backward()
    trace.record(model, loss)
    return trace


def weights_replaced(model: nn.Module) -> Trace:
    trace = clip(model)
    model.head.weight.data = model.head.weight.detach() * 2  # type: ignore[union-attr]
    model.blocks[0][0].bias.data.fill_(0.25)  # type: ignore[index]
    loss = next_token(model, tokens())
    loss.backward()
    trace.record(model, loss)
    return trace


def other_shapes(model: nn.Module) -> Trace:
    trace, optimizer = Trace(), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for shape in ((2, 8), (3, 8), (2, 5), (2, 8)):
        optimizer.zero_grad()
        loss = next_token(model, tokens(*shape))
        loss.backward()
        trace.record(model, loss)
        optimizer.step()
    return trace


LOOPS: dict[str, Loop] = {
    "accumulate 2": accumulate(2),
    "accumulate 4": accumulate(4),
    "clip": clip,
    "schedule": schedule,
    "parameter groups": parameter_groups,
    "evaluate between": evaluate_between,
    "two forwards": two_forwards,
    "forwards without backward": forwards_without_backward,
    "frozen": frozen,
    "frozen and thawed": frozen_and_thawed,
    "gradient from outside": gradient_from_outside,
    "weights replaced": weights_replaced,
    "other shapes": other_shapes,
}


@pytest.mark.parametrize("placement, dropout, recompute", [("cpu", 0.2, "all"), ("auto", 0.0, "none")])
@pytest.mark.parametrize("loop", LOOPS)
def test_any_loop(loop: str, placement: str, dropout: float, recompute: str) -> None:
    # The tied weight's four gradients are added pair by pair of a forward here, all embeddings first there.
    case = Case("blocks", lambda: Blocks(dropout), loss=next_token, exact=loop != "two forwards")
    with shared_captures():
        plain, ours = case.seeded(), geminifx.compile(case.seeded(), placement=placement, recompute=recompute)
    traces = []
    for model in (ours, plain):
        torch.manual_seed(1)
        traces.append(LOOPS[loop](model))
    assert_same(case, *traces)
    assert_same_state(case, ours, plain, path=0.1)
    if loop != "gradient from outside":
        assert all(gradients["unused"] is None for gradients in traces[0].gradients)


# -- dropout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_dropout_draws_the_same_numbers_as_plain_pytorch(recompute: str) -> None:
    case = Case("gpt2 with dropout", lambda: gpt2(dropout=0.1))
    ours, plain = compiled(case, placement="cpu", recompute=recompute), case.seeded()
    assert_same(case, train(case, ours), train(case, plain))
    state = torch.get_rng_state()
    train(case, plain)
    assert torch.equal(torch.get_rng_state(), state), "as many numbers were drawn"


def test_recompute_replays_the_dropout_of_attention() -> None:
    case = Case("opt", lambda: opt(dropout=0.1, attention_dropout=0.2))
    kept, recomputed = (compiled(case, placement="cpu", recompute=r) for r in RECOMPUTE)
    assert_same(case, train(case, recomputed), train(case, kept))


# -- inputs and outputs ------------------------------------------------------------------------------------


@everywhere
def test_inputs_get_their_gradients(placement: str) -> None:
    results = []
    for model in (geminifx.compile(MLP.seeded(), placement=placement), MLP.seeded()):
        x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
        # The input is itself computed from a parameter outside of the model, as a soft prompt is.
        F.cross_entropy(model(x * 2), torch.arange(4) % 3).backward()
        results.append(x.grad)
    assert results[0] is not None and torch.equal(*results)  # type: ignore[arg-type]


def test_a_frozen_model_gives_its_inputs_gradients() -> None:
    results = []
    for build in (lambda m: geminifx.compile(m), lambda m: m):
        model = build(MLP.seeded().requires_grad_(False))
        x = torch.ones(4, 48, requires_grad=True)
        model(x).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        results.append(x.grad)
    assert results[0] is not None and torch.equal(*results)  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_with_outputs_all_a_loss_of_the_logits_trains_too(recompute: str) -> None:
    def both(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out = model(**batch)
        return out.loss + out.logits.float().logsumexp(-1).square().mean()

    case = Case("gpt2", GPT2.build, loss=both)
    ours = geminifx.compile(case.seeded(), outputs="all", placement="cpu", recompute=recompute)
    assert_same(case, train(case, ours, steps=2), train(case, case.seeded(), steps=2))


def test_without_labels_the_logits_are_differentiable() -> None:
    def outside(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(input_ids=batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten())

    case = Case("opt", OPT.build, loss=outside)
    ours = geminifx.compile(case.seeded(), placement="cpu")
    assert_same(case, train(case, ours, steps=2), train(case, case.seeded(), steps=2))


def test_evaluation_returns_every_output() -> None:
    ours, plain = compiled(OPT).eval(), OPT.seeded().eval()
    with torch.no_grad():
        a, b = ours(**tokens()), plain(**tokens())
    assert type(a) is type(b)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.logits, b.logits)


def test_batch_norm_evaluates_with_its_running_statistics() -> None:
    ours, plain = compiled(CNN, placement="cpu"), CNN.seeded()
    for model in (ours, plain):
        train(CNN, model, steps=2)
        model.eval()
    with torch.no_grad():
        assert torch.equal(*(cross_entropy(model, CNN.batch(seed=9)) for model in (ours, plain)))


def test_several_models_in_one_process() -> None:
    """A teacher that only evaluates, and a student: each keeps its own state."""
    traces = []
    for wrap in (lambda m, p: geminifx.compile(m, placement=p), lambda m, p: m):
        teacher, student = wrap(OPT.seeded().eval(), "cpu"), wrap(GPT2.seeded(), "auto")
        trace, optimizer = Trace(), torch.optim.AdamW(student.parameters(), lr=1e-2)
        for step in range(3):
            ids = tokens(seed=step)["input_ids"]
            with torch.no_grad():
                target = teacher(input_ids=ids).logits.softmax(-1)
            optimizer.zero_grad()
            loss = F.cross_entropy(student(input_ids=ids).logits.flatten(0, 1), target.flatten(0, 1))
            loss.backward()
            trace.record(student, loss)
            optimizer.step()
        traces.append(trace)
    assert_same(GPT2, *traces)


# -- bf16 --------------------------------------------------------------------------------------------------


def mixed_precision(case: Case, steps: int) -> tuple[Trace, nn.Module]:
    """By hand what precision="bf16" means: bf16 weights compute, fp32 masters and gradients are updated."""
    masters, computes = case.seeded(), case.seeded()
    optimizer, trace = OPTIMIZERS["adamw"](masters.parameters()), Trace()
    for step in range(steps):
        for master, parameter in zip(masters.parameters(), computes.parameters(), strict=True):
            parameter.data, parameter.grad = master.detach().bfloat16(), None
        batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.batch(seed=step).items()}
        loss = case.loss(computes, batch)
        loss.backward()
        for master, parameter in zip(masters.parameters(), computes.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        trace.record(masters, loss)
        optimizer.step()
    return trace, masters


@everywhere
@pytest.mark.parametrize("case", [BLOCKS, GPT2, MLP], ids=lambda case: case.name)
def test_bf16_is_bf16_weights_with_fp32_masters(case: Case, placement: str) -> None:
    ours = compiled(case, precision="bf16", placement=placement)
    expected, masters = mixed_precision(case, steps=3)
    assert_same(case, train(case, ours, steps=3), expected)
    assert_same_state(case, ours, masters, path=0)
    assert all(p.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("case", [OPT, LLAMA], ids=lambda case: case.name)
def test_bf16_is_near_fp32(case: Case) -> None:
    """bf16 keeps 8 bits: each of the some 30 operators between input and loss rounds by up to 2^-9, and such
    errors add up like a random walk, so that 30^0.5 * 2^-9, about 1%, is expected of a gradient; 4% is four
    times as far. The loss, a mean of many logarithms, is nearer."""
    low, full = (train(case, compiled(case, precision=p, placement="cpu"), steps=1) for p in ("bf16", "fp32"))
    assert abs(low.losses[0] - full.losses[0]) < 2**-7 * full.losses[0]
    squares = [(low.gradients[0][n] - g, g) for n, g in full.gradients[0].items() if g is not None]
    apart, size = (sum(pair[i].square().sum() for pair in squares) ** 0.5 for i in (0, 1))
    assert 0 < apart < 0.04 * size
