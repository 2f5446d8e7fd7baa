"""Activations that wait on the host: the same training bit for bit, less of the device, and all memory comes back."""

import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import geminifx
import pytest
import torch
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.verify import offloaded
from geminifx.runtime.isa.errors import ArgumentError, BudgetError
from geminifx.runtime.isa.instructions import OFFLOAD
from more_models import DECODER
from optimizing import ADAMW, Loop, plain, same_weights
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from zoo import VOCAB, Batch, Case, Trace, compiled, cross_entropy, images, opt, tokens, train

DEPTH = 5
LATE = pytest.mark.parametrize(
    "copies", ["immediate", "open", pytest.param("late", marks=pytest.mark.slow)], indirect=True
)
ALIKE = pytest.mark.parametrize("recompute", ["none", "all"])


@pytest.fixture(autouse=True)
def _small_values_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geminifx.passes.offload.SMALLEST_BYTES", 1)


# -- models ------------------------------------------------------------------------------------------------


def _stack(dropout: float = 0.0) -> nn.Module:
    """Blocks with a chunk each."""
    block = lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(dropout), nn.Linear(128, 64))  # noqa: E731
    return nn.Sequential(*(block() for _ in range(DEPTH)), nn.Linear(64, 3))


def vectors(batch: int = 64, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"input": torch.randn(batch, 64, generator=generator), "target": torch.arange(batch) % 3}


def _gpt2() -> nn.Module:
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=DEPTH, n_head=4, n_positions=32, **rates)
    ).train()


def _llama() -> nn.Module:
    sizes = {**DECODER, "num_hidden_layers": DEPTH, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).train()


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 128, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.1}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, **sizes, decoder_start_token_id=0, pad_token_id=0)
    ).train()


def _cnn() -> nn.Module:
    stage = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())  # noqa: E731
    stages = [stage(3, 32), *(stage(32, 32) for _ in range(DEPTH))]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5))


STACK = Case("stack", lambda: _stack(0.1), vectors, cross_entropy)
OPT = Case("opt", lambda: opt(num_hidden_layers=DEPTH))
GPT2 = Case("gpt2, tied, with dropout", _gpt2)
LLAMA, T5 = Case("llama", _llama, exact=False), Case("t5, with dropout", _t5, exact=False)
CNN = Case("cnn", _cnn, images, cross_entropy)
SLOW = [pytest.param(case, marks=pytest.mark.slow, id=case.name) for case in (GPT2, LLAMA, T5)]
MODELS = [*(pytest.param(case, id=case.name) for case in (STACK, OPT, CNN)), *SLOW]


def offloading(case: Case, **options: Any) -> geminifx.CompiledModule:
    model = compiled(case, offload="all", **options)
    assert model.plan.offload and model.plan.estimate.offloaded_bytes > 0
    return model


def same(a: Trace, b: Trace) -> bool:
    losses = all(map(torch.equal, a.losses, b.losses))
    return losses and all(
        (x[name] is None and y[name] is None) or torch.equal(x[name], y[name])  # type: ignore[arg-type]
        for x, y in zip(a.gradients, b.gradients, strict=True)
        for name in x
    )


def held_bytes(model: geminifx.CompiledModule) -> int:
    gc.collect()
    return model.session.machine.offloads.used_bytes


# -- numbers -----------------------------------------------------------------------------------------------


@ALIKE
@pytest.mark.parametrize("case", MODELS)
def test_training_is_plain_pytorchs(case: Case, recompute: str) -> None:
    ours = train(case, offloading(case, placement="cpu", recompute=recompute), steps=3)
    there = case.seeded() if case.exact else compiled(case, placement="cpu", recompute=recompute, offload="none")
    assert same(ours, train(case, there, steps=3))


ROUTES: dict[str, Callable[[nn.Module, int], torch.optim.Optimizer]] = {
    "torch's": lambda model, micro: ADAMW[0](model.parameters(), **ADAMW[1], fused=True),
    "ours": lambda model, micro: model.optimizer(ADAMW[0], **ADAMW[1], accumulate=micro),
    "in the backward": lambda model, micro: model.optimizer(ADAMW[0], **ADAMW[1], in_backward=True, accumulate=micro),
}


CELLS = {
    "host, kept": ("cpu", "none", 1, Loop(3)),
    "device, recomputed, accumulated": ("cuda", "all", 1, Loop(2, micro=3)),
    "auto, kept, on demand": ("auto", "none", 0, Loop(3, clip=0.1)),
    "host, recomputed, on demand, accumulated": ("cpu", "all", 0, Loop(2, micro=3)),
    "auto, recomputed": ("auto", "all", 1, Loop(3, clip=0.1)),
}
"""Where states lie, what is recomputed, how many chunks ahead copies start, and the loop."""


@cache
def _plan(placement: str, recompute: str) -> Plan:
    return offloading(STACK, placement=placement, recompute=recompute).plan


def _engines() -> list[Any]:
    """Every cell with every route, by one engine each in turn; by the others they are slow."""
    combined = itertools.product(enumerate(CELLS), enumerate(ROUTES), enumerate(("immediate", "open", "late")))
    return [
        pytest.param(cell, route, copies, marks=() if (i + j) % 2 == k else pytest.mark.slow)
        for (i, cell), (j, route), (k, copies) in combined
    ]


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("cell, route, copies", _engines(), indirect=["copies"])
def test_wherever_and_however_it_is_updated(cell: str, route: str) -> None:
    placement, recompute, prefetch, loop = CELLS[cell]
    if route == "in the backward":
        loop = replace(loop, clip=None)
    model = compiled(STACK, plan=replace(_plan(placement, recompute), prefetch=prefetch))
    optimizer = ROUTES[route](model, loop.micro)
    reference, expected = plain(STACK, ADAMW[0], **ADAMW[1])
    assert all(map(torch.equal, loop.run(STACK, model, optimizer), loop.run(STACK, reference, expected)))
    assert same_weights(model, reference)
    assert model.plan.estimate.offloaded_bytes > 0 and held_bytes(model) == 0


@pytest.mark.usefixtures("copies")
@LATE
def test_two_forwards_before_one_backward() -> None:
    traces = []
    for model in (offloading(STACK, placement="cpu", recompute="none"), STACK.seeded()):
        torch.manual_seed(1)
        trace = Trace()
        for step in range(3):
            model.zero_grad()
            first, second = (STACK.loss(model, STACK.batch(seed=2 * step + i)) for i in range(2))
            if isinstance(model, geminifx.CompiledModule):
                assert held_bytes(model) == 2 * model.plan.estimate.offloaded_bytes
            (second - first).backward()
            trace.record(model, second - first)
        traces.append(trace)
    assert same(*traces)


def test_evaluation_keeps_nothing() -> None:
    model, reference = offloading(STACK, placement="cpu").eval(), STACK.seeded().eval()
    with torch.no_grad():
        assert torch.equal(model(STACK.batch()["input"]), reference(STACK.batch()["input"]))
    assert held_bytes(model) == 0 and "offload" not in str(model.graph["evaluation"])


# -- memory ------------------------------------------------------------------------------------------------


@ALIKE
@pytest.mark.parametrize("placement", ["cpu", "cuda"])
def test_it_takes_less_of_the_device_and_what_is_planned(placement: str, recompute: str) -> None:
    peaks = []
    for offload in ("none", "all"):
        model = compiled(STACK, placement=placement, recompute=recompute, offload=offload)
        train(STACK, model, steps=2)
        stats, plan = model.stats, model.plan
        assert stats.device_peak_bytes <= plan.peak_bytes
        assert stats.host_peak_bytes <= plan.estimate.host_bytes
        peaks.append(stats.device_peak_bytes)
        moved = stats.step.to_host_bytes, stats.step.to_device_bytes
        assert all(num_bytes >= plan.estimate.offloaded_bytes for num_bytes in moved)
    assert peaks[1] < peaks[0]


def test_a_budget_is_kept_to_that_nothing_else_fits() -> None:
    with pytest.raises(BudgetError) as refused:
        compiled(STACK, device_budget=1, offload="none")
    smallest_bytes = refused.value.smallest_bytes
    assert smallest_bytes is not None
    model = compiled(STACK, device_budget=smallest_bytes - 1)
    assert model.plan.recompute and model.plan.offload
    assert same(train(STACK, model), train(STACK, STACK.seeded()))
    assert model.stats.device_peak_bytes < smallest_bytes


def test_memory_of_a_loss_that_is_dropped_is_used_again() -> None:
    model = offloading(STACK, placement="cpu", recompute="none")
    loss = STACK.loss(model, STACK.batch())
    host = model.session.hardware.host_tier
    assert held_bytes(model) == model.plan.estimate.offloaded_bytes
    used_bytes = host.used_bytes
    del loss
    assert held_bytes(model) == 0
    STACK.loss(model, STACK.batch()).backward()
    assert held_bytes(model) == 0 and host.used_bytes == used_bytes


def test_memory_of_a_step_that_fails_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloading(STACK, placement="cpu", recompute="none")

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    for instruction in ("reload", "arrive", "offload"):
        loss = STACK.loss(model, STACK.batch()) if instruction != "offload" else None
        with monkeypatch.context() as patched:
            for compiled_ in model.session.last.values():
                patched.setattr(compiled_.executor.called, instruction, fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                (loss if loss is not None else STACK.loss(model, STACK.batch())).backward()
        del loss
        assert held_bytes(model) == 0
    model.zero_grad()
    reference = STACK.seeded()
    assert same(train(STACK, model, steps=2), train(STACK, reference, steps=2))


def test_memory_of_another_shape_makes_room() -> None:
    options = {"placement": "cpu", "recompute": "none"}
    host_budget = offloading(STACK, **options).plan.estimate.host_bytes  # of 64 examples
    model = offloading(STACK, **options, host_budget=host_budget)
    for batch in (64, 32, 64, 20):
        STACK.loss(model, vectors(batch)).backward()
        assert held_bytes(model) == 0
    assert model.stats.host_peak_bytes <= host_budget


def test_a_full_host_names_the_way_out() -> None:
    plan = offloading(STACK, placement="cpu", recompute="none").plan
    too_small = plan.estimate.host_bytes - 1
    with pytest.raises(BudgetError, match=r"of offloaded activations.*offload fewer blocks \(offload=\)"):
        compiled(STACK, placement="cpu", recompute="none", offload="all", host_budget=too_small)
    model = offloading(STACK, placement="cpu", recompute="none", host_budget=plan.estimate.host_bytes)
    loss = STACK.loss(model, STACK.batch())
    with pytest.raises(BudgetError, match=r"the host tier is full: an offloaded activation needs .* raise the host"):
        STACK.loss(model, STACK.batch())
    assert held_bytes(model) == plan.estimate.offloaded_bytes, "the first step's"
    loss.backward()
    assert held_bytes(model) == 0


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("copies", ["open"], indirect=True)
def test_a_search_for_what_is_not_finite_looks_at_nothing_that_has_not_come() -> None:
    model = offloading(STACK, placement="cpu", recompute="none")
    x = STACK.batch()["input"]
    model(x * float("nan")).sum().backward()  # and so the memory on the host has such values from now on
    assert model.first_nonfinite(x) is None
    assert str(model.first_nonfinite(x * float("nan"))).startswith("input")
    assert held_bytes(model) == 0


# -- what is asked for -------------------------------------------------------------------------------------


def test_blocks_by_name() -> None:
    model = compiled(STACK, placement="cpu", recompute=("0",), offload=("0", "1"))
    assert model.plan.offload == ("0", "1")
    assert model.plan.estimate.offloaded_bytes < offloading(STACK, placement="cpu").plan.estimate.offloaded_bytes
    assert "activations of 2 block(s)" in str(model.plan)
    assert Plan.from_json(model.plan.to_json()) == model.plan
    assert same(train(STACK, model, steps=2), train(STACK, STACK.seeded(), steps=2))


def test_what_cannot_be_offloaded() -> None:
    with pytest.raises(ArgumentError, match=r"offload='some'; expected one of 'auto', 'none', 'all'"):
        compiled(STACK, offload="some")
    with pytest.raises(ArgumentError, match=r"offload=3; expected 'auto', 'none', 'all' or names of blocks"):
        compiled(STACK, offload=3)
    with pytest.raises(ArgumentError, match=r"offload names 'nosuch', which is not a block; the blocks are 0, 1, "):
        compiled(STACK, offload=("nosuch",))
    plan = replace(compiled(STACK).plan, offload=("nosuch",))
    with pytest.raises(ArgumentError, match=r"offload is 'nosuch' among others, expected names of blocks: 0, 1, "):
        compiled(STACK, plan=plan)


WIDE = Case("opt", lambda: opt(num_hidden_layers=3, hidden_size=64, word_embed_proj_dim=64), lambda: tokens(batch=8))


SHARDED = [
    pytest.param(mode, size, recompute, marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
    for i, (mode, size) in enumerate((("1d", 2), ("2d", 4), ("2.5d", 4), ("3d", 8)))
    for j, recompute in enumerate(("none", "all"))
]
"""Every mode with one of the two; with the other one they are slow."""


@pytest.mark.parametrize(("mode", "size", "recompute"), SHARDED)
def test_programs_of_sharded_tensors(mode: str, size: int, recompute: str) -> None:
    tensor = {"mode": mode, "size": size, **({"depth": 1} if mode == "2.5d" else {})}
    model = offloading(WIDE, world_size=size, parallel={"tensor": tensor}, placement="cpu", recompute=recompute)
    flat = next(c for c in model.session.last.values() if c.trains).flat
    assert flat.calls(OFFLOAD) and offloaded.check(flat, model.plan) is None
