"""Lightning's Trainer and Fabric train a compiled model as they do a plain one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo import GPT2, LLAMA, Case

lightning = pytest.importorskip("lightning", reason="lightning comes with the extra `loops`: make test-loops")

import geminifx  # noqa: E402
from lightning.fabric import Fabric  # noqa: E402
from trainers import BOTH, difference, rows, same  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*litlogger", "ignore::FutureWarning")


class Task(lightning.LightningModule):
    """A model, trained on the loss that it returns, and what was seen of it."""

    def __init__(self, model: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, number: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("validation", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.model)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)]


class ByHand(Task):
    """Every second batch ends a step, and gradients are clipped in between."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.automatic_optimization = False

    def training_step(self, batch: Any, number: int) -> Tensor:
        loss = super().training_step(batch, number)
        self.manual_backward(loss / 2)
        if number % 2:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return loss


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def our_own(model: Any) -> torch.optim.Optimizer:
    return model.optimizer(torch.optim.AdamW, lr=1e-2)


def fit(task: Task, directory: Path, resumes: Path | None = None, **changes: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    given = {"max_epochs": 2, "enable_checkpointing": False, "default_root_dir": directory, **quiet, **changes}
    trainer = lightning.Trainer(accelerator="cpu", devices=1, **given)
    trainer.fit(task, DataLoader(rows(), batch_size=4), DataLoader(rows(1), batch_size=4), ckpt_path=resumes)
    return trainer


def check_near(case: Case, found: Task, expected: Task) -> None:
    assert len(found.losses) == len(expected.losses) and expected.losses[0] > expected.losses[-1]
    if case.exact:
        assert all(map(torch.equal, found.losses, expected.losses)) and same(found.model, expected.model)
    else:
        assert torch.allclose(torch.stack(found.losses), torch.stack(expected.losses), rtol=1e-4, atol=0)
        assert difference(found.model, expected.model) <= 1e-4


def check_equal(case: Case, directory: Path, kind: type[Task] = Task, **changes: Any) -> None:
    plain, found = (kind(act(case.seeded()), adamw) for act in BOTH)
    expected, trainer = fit(plain, directory, **changes), fit(found, directory, **changes)
    check_near(case, found, plain)
    value, right = (each.callback_metrics["validation"].item() for each in (trainer, expected))
    assert value == pytest.approx(right, rel=0 if case.exact else 1e-4)
    validation = 2 + 2 * 4  # steps of a first check, and of each epoch
    assert found.model.stats.steps == len(found.losses) + validation, "all of it ran compiled"


def test_lightning_trains_as_a_plain_model(tmp_path: Path) -> None:
    check_equal(GPT2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "changes", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"detect_anomaly": True}], ids=str
)
def test_arguments_of_lightning(case: Case, changes: dict[str, Any], tmp_path: Path) -> None:
    check_equal(case, tmp_path, **changes)


@pytest.mark.slow
def test_optimization_by_hand(tmp_path: Path) -> None:
    check_equal(GPT2, tmp_path, ByHand)


@pytest.mark.slow
@pytest.mark.parametrize("declared", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str)
def test_our_own_optimizer_in_lightning(declared: dict[str, Any], tmp_path: Path) -> None:
    plain, found = Task(GPT2.seeded(), adamw), Task(geminifx.compile(GPT2.seeded()), our_own)
    fit(plain, tmp_path, **declared), fit(found, tmp_path, **declared)
    exact = "gradient_clip_val" not in declared  # squares are summed in another order
    assert torch.allclose(torch.stack(found.losses), torch.stack(plain.losses), rtol=0 if exact else 1e-5, atol=0)
    assert difference(found.model, plain.model) <= (0 if exact else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [adamw, our_own], ids=["torch's optimizer", "our own"])
def test_lightning_resumes_from_its_checkpoint(optimizer: Any, tmp_path: Path) -> None:
    made = [Task(geminifx.compile(GPT2.seeded()), optimizer) for _ in range(3)]
    whole, first, second = made
    fit(whole, tmp_path)
    fit(first, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, resumes=tmp_path / "half.ckpt")
    assert all(map(torch.equal, first.losses + second.losses, whole.losses)) and same(second.model, whole.model)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    plain = Task(GPT2.seeded(), adamw)
    plain.load_state_dict(saved)
    assert same(plain.model, first.model), "a plain model loads it"


@pytest.mark.slow
def test_lightnings_precision_leaves_the_models_own(tmp_path: Path) -> None:
    """Autocast does not reach into a compiled step, whose precision compile() chose."""
    plain, found = Task(GPT2.seeded(), adamw), Task(geminifx.compile(GPT2.seeded()), adamw)
    fit(plain, tmp_path), fit(found, tmp_path, precision="bf16-mixed")
    check_near(GPT2, found, plain)


# -- Fabric ------------------------------------------------------------------------------------------------


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None, accumulate: int = 1,
         **options: Any) -> list[Tensor]:  # fmt: skip
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(rows(), batch_size=4))
    losses = []
    for _ in range(2):
        for i, batch in enumerate(loader):
            loss = model(**batch).loss
            fabric.backward(loss / accumulate)
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    fabric.clip_gradients(model, optimizer, max_norm=clip)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach().clone())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize("given", [{}, {"clip": 0.1}, {"accumulate": 2}], ids=str)
def test_a_loop_of_fabric(case: Case, given: dict[str, Any]) -> None:
    plain, model = (act(case.seeded()) for act in BOTH)
    expected, found = loop(plain, adamw(plain), **given), loop(model, adamw(model), **given)
    assert expected[0] > expected[-1] and model.stats.steps == len(found)
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=0 if case.exact else 1e-4, atol=0)
    assert difference(model, plain) <= (0 if case.exact else 1e-4)


@pytest.mark.slow
def test_our_own_optimizer_in_a_loop_of_fabric() -> None:
    plain, model = (act(GPT2.seeded()) for act in BOTH)
    expected, found = loop(plain, adamw(plain)), loop(model, our_own(model))
    assert all(map(torch.equal, found, expected)) and same(model, plain)


@pytest.mark.slow
def test_fabric_saves_and_loads(tmp_path: Path) -> None:
    models = [geminifx.compile(GPT2.seeded()) for _ in range(2)]
    optimizers = [adamw(model) for model in models]
    loop(models[0], optimizers[0])
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "state", {"model": models[0], "optimizer": optimizers[0]})
    fabric.load(tmp_path / "state", {"model": models[1], "optimizer": optimizers[1]})
    assert same(*models)
    first, second = (loop(*each) for each in zip(models, optimizers, strict=True))
    assert all(map(torch.equal, first, second)) and same(*models)
