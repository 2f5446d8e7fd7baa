"""accelerate's loop trains a compiled model as it does a plain one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo import GPT2, LLAMA, MLP, Case, compiled

accelerate = pytest.importorskip("accelerate")

import geminifx  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from trainers import difference, rows, same  # noqa: E402


def reset() -> None:
    """accelerate keeps what it was first made with, for all of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    reset()
    yield
    reset()


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, clip: float | None = None,
         **options: Any) -> tuple[list[Tensor], Any]:  # fmt: skip
    """The losses, and what came back for the model."""
    accelerator = accelerate.Accelerator(cpu=True, **options)
    loader = DataLoader(rows(), batch_size=4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    for _ in range(steps):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach().clone())
    return losses, accelerator.unwrap_model(model)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def check_equal(case: Case, **given: Any) -> None:
    plain, model = case.seeded(), geminifx.compile(case.seeded())
    expected, _ = loop(plain, adamw(plain), **given)
    found, back = loop(model, adamw(model), **given)
    assert back is model and expected[0] > expected[-1]
    if case.exact:
        assert all(map(torch.equal, found, expected)) and same(model, plain)
    else:
        assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=0)
        assert difference(model, plain) <= 1e-4


def test_a_loop_of_accelerate_trains_as_a_plain_model(recwarn: pytest.WarningsRecorder) -> None:
    check_equal(GPT2)
    assert not [w for w in recwarn if "compiled" in str(w.message)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize("given", [{}, {"gradient_accumulation_steps": 2}, {"clip": 0.1}], ids=str)
def test_what_loops_of_accelerate_do(case: Case, given: dict[str, Any]) -> None:
    check_equal(case, **given)


@pytest.mark.slow
@pytest.mark.parametrize("declared", [{}, {"in_backward": True}, {"accumulate": 2}], ids=str)
def test_our_own_optimizer_in_a_loop_of_accelerate(declared: dict[str, Any]) -> None:
    given = {"gradient_accumulation_steps": declared.get("accumulate", 1)}
    plain, model = GPT2.seeded(), compiled(GPT2)
    expected, _ = loop(plain, adamw(plain), **given)
    found, _ = loop(model, model.optimizer(torch.optim.AdamW, lr=1e-2, **declared), **given)
    assert all(map(torch.equal, found, expected)) and same(model, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "ours"),
    [
        (GPT2, False),
        (GPT2, True),
        (LLAMA, False),
        (LLAMA, True),
    ],
    ids=["tied, torch's optimizer", "tied, our own", "torch's optimizer", "our own"],
)
def test_a_state_that_accelerate_saves_is_loaded_again(case: Case, ours: bool, tmp_path: Path) -> None:
    """And training goes on from it as it did."""

    def made() -> tuple[Any, Any, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = compiled(case)
        optimizer = model.optimizer(torch.optim.AdamW, lr=1e-2) if ours else adamw(model)
        return accelerator, *accelerator.prepare(model, optimizer)

    def steps(model: Any, optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            model(**case.batch(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    accelerator, model, optimizer = made()
    steps(model, optimizer, range(2))
    accelerator.save_state(str(tmp_path / "state"))
    steps(model, optimizer, range(2, 4))
    other, again, resumed = made()
    steps(again, resumed, range(7, 8))  # what is loaded replaces another state
    other.load_state(str(tmp_path / "state"))
    steps(again, resumed, range(2, 4))
    assert same(again, model)


@pytest.mark.slow
def test_accelerates_precision_leaves_the_models_own() -> None:
    """Autocast does not reach into a compiled step, whose precision compile() chose."""
    model, plain = geminifx.compile(GPT2.seeded()), GPT2.seeded()
    found, _ = loop(model, adamw(model), mixed_precision="bf16")
    reset()
    expected, _ = loop(plain, adamw(plain))
    assert all(map(torch.equal, found, expected)) and same(model, plain)


@pytest.mark.slow
def test_a_model_without_a_configuration() -> None:
    plain, model = MLP.seeded(), geminifx.compile(MLP.seeded())
    for each in (plain, model):
        accelerator = accelerate.Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(each, adamw(each))
        for step in range(3):
            accelerator.backward(MLP.loss(prepared, MLP.batch(seed=step)))
            optimizer.step()
            optimizer.zero_grad()
    assert same(model, plain)


@pytest.mark.slow
def test_a_model_is_unwrapped_of_what_converts_its_outputs() -> None:
    model = geminifx.compile(GPT2.seeded())
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = accelerator.prepare(model)
    found = wrapped(**GPT2.batch()).loss
    back = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert back is model and torch.equal(back(**GPT2.batch()).loss, found) and model.stats.steps == 2
