"""Hugging Face's Trainer logs of a compiled model, and saves of it, what it does of a plain one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from zoo import GPT2, LLAMA, Case, compiled

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("shared"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning"),
]

import geminifx  # noqa: E402
from geminifx.runtime.isa.errors import StateError  # noqa: E402
from trainers import BOTH, accuracy, classified, classifier, difference, logged, losses, same, trainer  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer  # noqa: E402

BERT = Case("bert", classifier)
SLOW_LLAMA = pytest.param(LLAMA, marks=pytest.mark.slow, id="llama")


def both(case: Case, directory: Path, **changes: Any) -> tuple[Trainer, Trainer]:
    """The plain model's and the compiled model's, trained."""
    made = [trainer(act(case.seeded()), directory / act.__name__, **changes) for act in BOTH]
    for each in made:
        each.train()
    return made[0], made[1]


def check_equal(case: Case, directory: Path, **changes: Any) -> tuple[Trainer, Trainer]:
    plain, found = both(case, directory, **changes)
    expected = logged(plain)
    assert isinstance(found.model, geminifx.CompiledModule) and found.model.stats.steps > 0
    assert len(losses(plain)) == plain.args.max_steps and losses(plain)[0] != losses(plain)[-1]
    if case.exact:
        assert logged(found) == expected
        assert same(found.model, plain.model)
        return plain, found
    assert [entry.keys() for entry in logged(found)] == [entry.keys() for entry in expected]
    for entry, right in zip(logged(found), expected, strict=True):
        assert entry == pytest.approx(right, rel=1e-4)
    return plain, found


# -- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(GPT2, id="gpt2, tied"), SLOW_LLAMA])
def test_training_logs_what_a_plain_model_logs(case: Case, tmp_path: Path) -> None:
    check_equal(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"max_grad_norm": 0.1},
        {"max_grad_norm": 0.0},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"optim": "sgd"},
        {"per_device_train_batch_size": 3, "max_steps": 7, "dataloader_drop_last": False},
    ],
    ids=lambda changes: ", ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_arguments_of_training(case: Case, changes: dict[str, Any], tmp_path: Path) -> None:
    """The last ends epochs with a smaller batch."""
    check_equal(case, tmp_path, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
def test_training_with_evaluations_between(case: Case, tmp_path: Path) -> None:
    plain, _ = check_equal(case, tmp_path, eval_strategy="steps", eval_steps=2)
    assert sum("eval_loss" in entry for entry in logged(plain)) == 2


@pytest.mark.slow
def test_classification_with_metrics(tmp_path: Path) -> None:
    rows: dict[str, Any] = {"train_dataset": classified(), "eval_dataset": classified(1)}
    given = {"compute_metrics": accuracy, "eval_strategy": "steps", "eval_steps": 2}
    plain, found = check_equal(BERT, tmp_path, **rows, **given)
    assert any("eval_accuracy" in entry for entry in logged(plain))
    predicted, expected = found.predict(classified(2)), plain.predict(classified(2))
    assert torch.equal(torch.from_numpy(predicted.predictions), torch.from_numpy(expected.predictions))
    assert predicted.metrics["test_accuracy"] == expected.metrics["test_accuracy"]
    assert predicted.metrics["test_loss"] == expected.metrics["test_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
def test_evaluation_before_any_training(case: Case, tmp_path: Path) -> None:
    plain, found = (trainer(act(case.seeded()), tmp_path).evaluate() for act in BOTH)
    assert found.keys() == plain.keys()
    assert found["eval_loss"] == pytest.approx(plain["eval_loss"], rel=0 if case.exact else 1e-6)


# -- checkpoints -------------------------------------------------------------------------------------------


def names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
def test_a_saved_model_loads_with_transformers(case: Case, tmp_path: Path) -> None:
    plain, found = both(case, tmp_path, max_steps=1)
    for each, name in ((plain, "plain"), (found, "compiled")):
        each.save_model(str(tmp_path / name))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compiled")
    assert type(loaded) is type(plain.model) and same(loaded, found.model)
    assert names(tmp_path / "compiled") == names(tmp_path / "plain"), "what is tied is saved once"
    written = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("compiled", "plain")]
    assert written[0] == written[1]


@pytest.mark.slow
def test_a_saved_classifier_loads_with_transformers(tmp_path: Path) -> None:
    found = trainer(geminifx.compile(BERT.seeded()), tmp_path, train_dataset=classified(), max_steps=1)
    found.train()
    found.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(loaded, found.model)


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
def test_checkpoints_by_steps_are_those_of_a_plain_model(case: Case, tmp_path: Path) -> None:
    plain, found = check_equal(case, tmp_path, save_strategy="steps", save_steps=2)
    for step in (2, 4):
        ours, theirs = (Path(each.args.output_dir) / f"checkpoint-{step}" for each in (found, plain))
        assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
        assert names(ours) == names(theirs)
        models = [AutoModelForCausalLM.from_pretrained(path) for path in (ours, theirs)]
        assert difference(*models) <= (0 if case.exact else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_checkpoints_are_kept_than_asked(limit: int, tmp_path: Path) -> None:
    _, found = both(GPT2, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=limit)
    kept = sorted(path.name for path in Path(found.args.output_dir).iterdir())
    assert kept == [f"checkpoint-{step}" for step in range(5 - limit, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
def test_the_best_model_is_loaded_at_the_end(case: Case, tmp_path: Path) -> None:
    """Rows for evaluation have nothing to do with those for training: the first checkpoint is the best."""
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    plain, found = both(case, tmp_path, **changes, load_best_model_at_end=True, learning_rate=3e-2)
    assert plain.state.best_global_step == found.state.best_global_step
    assert plain.state.best_metric == pytest.approx(found.state.best_metric, rel=0 if case.exact else 1e-4)
    best = Path(found.args.output_dir) / f"checkpoint-{found.state.best_global_step}"
    assert same(found.model, AutoModelForCausalLM.from_pretrained(best))
    assert difference(found.model, plain.model) <= (0 if case.exact else 1e-4)
    assert found.evaluate()["eval_loss"] == pytest.approx(found.state.best_metric)


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize("start", ["compiled", "plain"])
def test_training_resumes_from_a_checkpoint(case: Case, start: str, tmp_path: Path) -> None:
    """Also from one that a plain model left."""
    plain, found = both(case, tmp_path, save_strategy="steps", save_steps=2)
    whole, left = (found, found) if start == "compiled" else (plain, plain)
    torch.manual_seed(7)
    model = geminifx.compile(case.build())
    resumed = trainer(model, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(Path(left.args.output_dir) / "checkpoint-2"))
    exact = case.exact or start == "compiled"
    assert losses(resumed) == pytest.approx(losses(whole), rel=0 if exact else 1e-4)
    assert difference(model, whole.model) <= (0 if exact else 1e-4)


# -- our own optimizer -------------------------------------------------------------------------------------


def with_our_own(directory: Path, declared: dict[str, Any], **changes: Any) -> Trainer:
    model = compiled(GPT2)
    optimizer = model.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, **declared)
    return trainer(model, directory, optimizers=(optimizer, None), **changes)


def with_torchs(model: nn.Module, directory: Path, **changes: Any) -> Trainer:
    """The Trainer's own leaves biases and norms without decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    return trainer(model, directory, optimizers=(optimizer, None), **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("declared", "changes"),
    [
        ({}, {"max_grad_norm": 0.0}),
        ({}, {"max_grad_norm": 0.1}),
        ({"accumulate": 2}, {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}),
    ],
    ids=["plain", "clipped", "accumulate"],
)
def test_training_by_our_optimizer(declared: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    plain = with_torchs(GPT2.seeded(), tmp_path / "plain", **changes)
    found = with_our_own(tmp_path / "found", declared, **changes)
    plain.train(), found.train()
    exact = not changes["max_grad_norm"]  # gradients are scaled tensor by tensor, and squares summed in that order
    assert losses(found) == pytest.approx(losses(plain), rel=0 if exact else 1e-5)
    assert difference(found.model, plain.model) <= (0 if exact else 1e-4)


@pytest.mark.slow
def test_updates_in_the_backward_leave_the_trainer_no_norm_to_log(tmp_path: Path) -> None:
    """It reads all gradients for that, with max_grad_norm=0 too."""
    with pytest.raises(StateError, match="consumes each gradient during the backward"):
        with_our_own(tmp_path, {"in_backward": True}, max_grad_norm=0.0).train()


@pytest.mark.slow
def test_our_optimizer_of_a_model_that_was_not_called_yet(tmp_path: Path) -> None:
    """Accelerate loads an optimizer's own state into it before the first step."""
    plain, model = GPT2.seeded(), geminifx.compile(GPT2.seeded())
    trainers = []
    for each, optimizer in ((plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)),
                            (model, model.optimizer(torch.optim.AdamW, lr=1e-2))):  # fmt: skip
        trainers.append(trainer(each, tmp_path, optimizers=(optimizer, None), max_grad_norm=0.0))
        trainers[-1].train()
    assert losses(trainers[1]) == losses(trainers[0])


@pytest.mark.slow
def test_our_optimizer_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = with_our_own(tmp_path / "whole", {}, **given)
    whole.train()
    resumed = with_our_own(tmp_path / "resumed", {}, **given)
    resumed.model.load_state_dict(GPT2.build().state_dict())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and same(resumed.model, whole.model)


@pytest.mark.slow
def test_a_model_of_our_optimizer_is_saved_and_loads(tmp_path: Path) -> None:
    found = with_our_own(tmp_path, {}, max_steps=1)
    found.train()
    found.save_model(str(tmp_path / "saved"))
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), found.model)


# -- what loops ask of a model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_dropout_and_a_budget(tmp_path: Path) -> None:
    """Losses go down under a budget that holds only some of the state; nothing is compared, for masks differ."""
    torch.manual_seed(0)
    model = geminifx.compile(Case("gpt2", lambda: GPT2.build(dropout=0.1)).seeded(), device_budget="500kB")
    found = trainer(model, tmp_path, max_steps=8)
    found.train()
    assert losses(found)[-1] < losses(found)[0]
    assert model.stats.device_peak_bytes <= 500_000


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
def test_gradient_checkpointing_is_left_to_the_plan(case: Case, tmp_path: Path) -> None:
    """The numbers are the same with it and without, and a warning tells."""
    plain = trainer(case.seeded(), tmp_path / "plain")
    found = trainer(geminifx.compile(case.seeded(), recompute="none"), tmp_path, gradient_checkpointing=True)
    plain.train()
    with pytest.warns(UserWarning, match="gradient checkpointing is on, but compiled steps ignore it"):
        found.train()
    assert losses(found) == pytest.approx(losses(plain), rel=0 if case.exact else 1e-4)
    assert not found.model.plan.recompute and "recompute:" not in found.model.graph["training"]


@pytest.mark.slow
def test_columns_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    """The Trainer reads the signature of the model's forward."""
    plain, found = (
        trainer(act(GPT2.seeded()), tmp_path, train_dataset=[{**row, "text": torch.ones(3)} for row in train_rows()])
        for act in BOTH
    )
    plain._set_signature_columns_if_needed(), found._set_signature_columns_if_needed()
    assert found._signature_columns == plain._signature_columns
    assert found.model_accepts_loss_kwargs == plain.model_accepts_loss_kwargs
    assert found.label_names == plain.label_names and found.can_return_loss == plain.can_return_loss


@pytest.mark.slow
def test_columns_of_a_loss_function_are_kept(tmp_path: Path) -> None:
    loss_fn = lambda output, wanted, weight=1.0: output.logits.mean() * weight + wanted.sum()  # noqa: E731
    found = trainer(geminifx.compile(GPT2.seeded(), loss_fn=loss_fn), tmp_path)
    found._set_signature_columns_if_needed()
    assert {"input_ids", "wanted", "weight"} <= set(found._signature_columns)


def train_rows() -> list[dict[str, Any]]:
    return [dict(row) for row in classified()]
