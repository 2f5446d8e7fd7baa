"""On CUDA: the numbers of plain PyTorch on the same device, within a budget as the driver reports it.

Kernels add in an order of their own there (atomics in the embedding's backward, split sums in matrix
products), so that nothing is compared bit by bit; each bound says what it allows.
"""

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.homes import Home, Where
from optimizing import MIXED
from torch import Tensor, nn
from zoo import BLOCKS, GPT2, LLAMA, MLP, OPT, Case, Trace, compiled, state_bytes, tokens

pytestmark = pytest.mark.cuda

WAYS = pytest.mark.parametrize(
    ("placement", "recompute"),
    [("cuda", "none"), ("cpu", "all"), ("auto", "none"),
     *(pytest.param(*way, marks=pytest.mark.slow) for way in [("cuda", "all"), ("cpu", "none"), ("auto", "all")])],
)  # fmt: skip
BUDGET = "3GB"  # the driver's context takes a part of it, on every card

# fp32: 2^-24 a rounding, sums of up to some thousand terms, each of a few layers amplifying: 2^-12.
# bf16: 2^-9 a rounding, some 30 operators on either side, errors adding like a random walk: 2^-5.
RELATIVE = {"fp32": 2**-12, "bf16": 2**-5}


@pytest.fixture(autouse=True)
def whole_device() -> Iterator[None]:
    """Each test starts with all of the device, whatever cap the one before it set."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in batch.items()}


def run(case: Case, model: nn.Module, steps: int, microbatches: int = 1) -> Trace:
    """AdamW with accumulation and clipping, the batches on the device."""
    trace, optimizer = Trace(), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(microbatches):
            batch = on_device(case.batch(seed=10 * step + micro))
            loss = case.loss(model, batch) / microbatches
            loss.backward()
        trace.record(model, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return trace


def low_precision(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """Loss and gradients of one step with bf16 weights, as precision="bf16" has them."""
    plain = case.seeded().cuda()
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16()
    batch = on_device(case.batch(seed=0))
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    loss = case.loss(plain, batch)
    loss.backward()
    return loss.detach().float(), {n: p.grad.float() for n, p in plain.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], relative: float) -> None:
    """Apart by at most `relative` of the whole gradient's norm: some of its parts are zero but for rounding."""
    named = {name: g for name, g in expected.items() if g is not None}
    assert named.keys() == {name for name, g in found.items() if g is not None}
    whole = sum(g.float().square().sum().item() for g in named.values()) ** 0.5
    for name, gradient in named.items():
        apart = (found[name].cpu().float() - gradient.cpu().float()).norm().item()  # type: ignore[union-attr]
        assert apart <= relative * whole, f"{name}: {apart / whole} of the gradient's norm"


def assert_kept(model: geminifx.CompiledModule) -> None:
    assert model.stats.device_peak_bytes <= model.plan.peak_bytes <= 3 * 10**9


@WAYS
@pytest.mark.parametrize("case", [OPT, GPT2, LLAMA, MLP, BLOCKS], ids=lambda case: case.name)
def test_fp32(case: Case, placement: str, recompute: str) -> None:
    plain = case.seeded().cuda()
    model = compiled(case, device_budget=BUDGET, precision="fp32", placement=placement, recompute=recompute)
    found, expected = run(case, model, 3, microbatches=2), run(case, plain, 3, microbatches=2)
    for step in range(3):
        assert abs(found.losses[step] - expected.losses[step]) <= RELATIVE["fp32"] * expected.losses[step]
    assert_near(found.gradients[0], expected.gradients[0], RELATIVE["fp32"])
    # AdamW may amplify what is rounding alone; a tenth of the way apart is another direction.
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        apart = (p.detach().cpu() - q.detach().cpu()).norm().item()
        assert apart <= 0.1 * 3 * 1e-3 * p.numel() ** 0.5, name
    assert {p.is_cuda for p in model.parameters()} == {placement != "cpu"}
    assert_kept(model)


@WAYS
@pytest.mark.parametrize("case", [OPT, LLAMA, BLOCKS], ids=lambda case: case.name)
def test_bf16(case: Case, placement: str, recompute: str) -> None:
    loss, gradients = low_precision(case)
    model = compiled(case, device_budget=BUDGET, placement=placement, recompute=recompute)
    found = run(case, model, 1)
    assert abs(found.losses[0].float() - loss) <= RELATIVE["bf16"] * loss
    # `record` stands before the clipping: these are the gradients as the backward left them.
    assert_near(found.gradients[0], gradients, RELATIVE["bf16"])
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_kept(model)


def test_recompute_replays_dropout() -> None:
    case = Case("blocks", lambda: type(BLOCKS.build())(0.3), loss=BLOCKS.loss)
    traces = []
    for recompute in ("none", "all"):
        model = geminifx.compile(case.seeded(), precision="fp32", placement="cpu", recompute=recompute)
        torch.manual_seed(1)
        traces.append(run(case, model, 2))
    assert_near(*(trace.gradients[0] for trace in traces), RELATIVE["fp32"])


def test_batches_on_either_side_and_evaluation_between_steps() -> None:
    plain, model = OPT.seeded().cuda(), compiled(OPT, precision="fp32", placement="auto")
    host = tokens()
    for batch in (host, on_device(host)):
        loss = model(**batch).loss
        loss.backward()
        assert loss.is_cuda
        with torch.no_grad():
            a, b = model.eval()(**batch), plain.eval()(**on_device(host))
        assert (a.logits - b.logits).abs().max() <= RELATIVE["fp32"] * b.logits.abs().max()
        model.train()
        plain.train()


def wide() -> nn.Module:
    """170 million parameters, 2.7 GB of training state, in blocks of 67 MB."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4096, 4096), nn.ReLU()) for _ in range(10)))


def test_a_training_state_larger_than_the_budget_is_trained_within_it() -> None:
    source, x = wide(), torch.randn(64, 4096)
    plain = copy.deepcopy(source)
    options = {"example_inputs": (x,), "precision": "fp32"}
    with pytest.raises(BudgetError, match="driver and libraries") as refused:
        geminifx.compile(source, device_budget="1MB", **options)
    assert refused.value.smallest_bytes is not None
    budget = refused.value.smallest_bytes + 300 * 2**20
    assert budget < state_bytes(source)
    model = geminifx.compile(source, device_budget=budget, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        free, total = torch.cuda.mem_get_info()
        assert total - free <= budget, "as the driver reports it, with everything else on the card"
    assert model.stats.device_peak_bytes <= budget
    assert model.stats.step.to_device_bytes > 0 and any(home.on_device or home.resident for home in model.plan.homes)
    torch.cuda.set_per_process_memory_fraction(1.0)
    del model, optimizer, source
    gc.collect()
    torch.cuda.empty_cache()
    plain.cuda()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)
    for expected in losses:
        optimizer.zero_grad()
        loss = plain(x.cuda()).square().mean()
        loss.backward()
        optimizer.step()
        assert abs(loss.item() - expected) <= RELATIVE["fp32"] * abs(expected)


def test_cuda_that_does_not_fit_is_refused_and_names_auto() -> None:
    x = torch.randn(64, 4096)
    with pytest.raises(BudgetError, match="placement='auto'"):
        geminifx.compile(wide(), device_budget="2GB", placement="cuda", example_inputs=(x,), precision="fp32")


def test_an_allocation_beyond_the_budget_is_an_error_that_leaves_training_able_to_go_on() -> None:
    model = compiled(MLP, device_budget=BUDGET, precision="fp32", placement="cpu")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(3 * 10**9, dtype=torch.uint8, device="cuda")
    assert all(map(torch.equal, before, model.parameters()))
    run(MLP, model, 1)
    F.mse_loss(model(MLP.batch()["input"]).float(), torch.zeros(4, 3, device="cuda")).backward()
    assert_kept(model)


def placed(case: Case, where: str, **options: object) -> geminifx.CompiledModule:
    """The model under a plan whose training states are all in one place, or everywhere."""
    model = compiled(case, device_budget=BUDGET, **options)
    every = range(len(model.plan.layout.chunks))
    homes = {
        "device": tuple(Home(Where.DEVICE) for _ in every),
        "host": tuple(Home() for _ in every),
        "host, weights resident": tuple(Home(resident=True) for _ in every),
        "streamed": tuple(Home(Where.STREAMED) for _ in every),
        "streamed, weights resident": tuple(Home(Where.STREAMED, resident=True) for _ in every),
        "everywhere": tuple(Home(MIXED[i % 3], resident=i % 2 == 0) for i in every),
    }[where]
    return compiled(case, device_budget=BUDGET, plan=replace(model.plan, homes=homes), **options)


def run_ours(model: geminifx.CompiledModule, case: Case, steps: int, **declared: object) -> dict[str, Tensor]:
    optimizer = model.optimizer(torch.optim.SGD, lr=1e-1, momentum=0.9, **declared)
    for step in range(steps):
        case.loss(model, on_device(case.batch(seed=step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


PLACES = ("device", "host", "host, weights resident", "streamed", "streamed, weights resident", "everywhere")


@pytest.mark.parametrize("declared", [{}, {"in_backward": True}, {"max_grad_norm": 0.1}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_optimizer_gives_the_same_parameters_wherever_the_states_are(precision: str, declared: dict) -> None:
    results = [run_ours(placed(MLP, where, precision=precision), MLP, 4, **declared) for where in PLACES]
    start = dict(MLP.seeded().named_parameters())
    moved = {name: expected - start[name].detach() for name, expected in results[0].items()}
    for found in results:
        assert_near({name: found[name] - start[name].detach() for name in moved}, dict(moved), RELATIVE[precision])


@pytest.mark.parametrize("in_backward", [False, True])
def test_our_optimizer_is_torchs_in_fp32(in_backward: bool) -> None:
    model, plain = placed(OPT, "everywhere", precision="fp32"), OPT.seeded().cuda()
    start = {name: p.detach().cpu().clone() for name, p in plain.named_parameters()}
    found = run_ours(model, OPT, 4, in_backward=in_backward)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-1, momentum=0.9, fused=True)
    for step in range(4):
        optimizer.zero_grad()
        OPT.loss(plain, on_device(OPT.batch(seed=step))).backward()
        optimizer.step()
    for name, p in plain.named_parameters():
        moved = (p.detach().cpu() - start[name]).norm()
        assert (found[name] - p.detach().cpu()).norm() <= RELATIVE["fp32"] * moved + 1e-6, name
    assert_kept(model)


def test_a_batch_in_page_locked_memory_may_be_filled_anew_at_once() -> None:
    """As loops do that have one buffer; the device is still at work when the call returns."""
    model, plain = (
        geminifx.compile(nn.Linear(4096, 4096, bias=False), precision="fp32"),
        nn.Linear(4096, 4096, bias=False),
    )
    plain.load_state_dict(model.state_dict())
    plain.cuda()
    buffer, found = torch.empty(4096, 4096).pin_memory(), []
    with torch.no_grad():
        for step in range(8):
            buffer.fill_(float(step))
            found.append(model(buffer)[0, 0])
        expected = [plain(torch.full((1, 4096), float(step)).cuda())[0, 0] for step in range(8)]
    assert [one.item() for one in found] == pytest.approx([one.item() for one in expected], rel=1e-3)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("placement", ["cpu", "cuda"])
def test_what_is_generated_is_plain_pytorchs(placement: Any, ours: bool) -> None:
    """In bfloat16, from prompts that lie on the host, between two steps."""
    torch.manual_seed(0)
    source = LLAMA.build()
    plain = copy.deepcopy(source).cuda()
    for parameter in plain.parameters():  # and no buffers, such as those of rotary positions
        parameter.data = parameter.data.bfloat16()
    model = geminifx.compile(source, placement=placement, device_budget=BUDGET, example_inputs=tokens())
    optimizer = model.optimizer(torch.optim.SGD, lr=0.0) if ours else torch.optim.SGD(model.parameters(), lr=0.0)
    prompt = tokens(length=6)["input_ids"]
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    expected = plain.eval().generate(prompt.cuda(), **{**given, "attention_mask": torch.ones_like(prompt).cuda()})
    for _ in range(2):
        assert torch.equal(model.eval().generate(prompt, **given), expected)
        model.train()(**on_device(tokens())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("placement", ["cpu", "cuda"])
def test_a_part_that_is_called_alone_and_gradients_that_are_clipped(placement: Any) -> None:
    model = geminifx.compile(LLAMA.build(), placement=placement, device_budget=BUDGET, example_inputs=tokens())
    optimizer = model.optimizer(torch.optim.AdamW, lr=1e-3)
    hidden = model.model(input_ids=tokens()["input_ids"].cuda())[0]
    assert hidden.is_cuda and hidden.dtype == torch.bfloat16
    hidden.float().square().mean().backward()
    norm = model.clip_grad_norm_(1e-3)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    clipped = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()).cpu() for g in gradients]))
    assert norm.item() > 1e-3 and clipped.item() == pytest.approx(1e-3, rel=1e-2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.step()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
