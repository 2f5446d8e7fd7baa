"""Hugging Face's Trainer on models of several kinds, with rows of several lengths: an encoder-decoder that generates
for its evaluation, adapters, a tied and an untied language model, a classifier."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from more_models import T5
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from zoo import GPT2, LLAMA, VOCAB, Case

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow, pytest.mark.usefixtures("shared"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]  # fmt: skip

import geminifx  # noqa: E402
from trainers import BOTH, accuracy, classified, classifier, difference, logged, losses, same, trainer  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

LENGTHS = (8, 5, 7, 4)
IGNORED = -100
Row = dict[str, Any]


def lengths(seed: int = 0, number: int = 16) -> list[Row]:
    """Rows of tokens that are not padded yet."""
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randint(3, VOCAB, (LENGTHS[i % len(LENGTHS)],), generator=generator) for i in range(number))
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    ids, labels = ([torch.as_tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "labels": padded_labels}


def translator(model: nn.Module, directory: Path) -> Seq2SeqTrainer:
    chosen = Seq2SeqTrainingArguments(
        output_dir=str(directory), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=4, seed=1,
        learning_rate=1e-1, optim="sgd",
        per_device_train_batch_size=4, per_device_eval_batch_size=4, logging_steps=1,
        eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, predict_with_generate=True, generation_max_length=5,
        load_best_model_at_end=True, metric_for_best_model="tokens",
    )  # fmt: skip
    return Seq2SeqTrainer(
        model=model, args=chosen, train_dataset=lengths(), eval_dataset=lengths(1), data_collator=padded,
        compute_metrics=different_tokens,
    )  # fmt: skip


def different_tokens(prediction: Any) -> dict[str, float]:
    """Of what was generated: ids, where logits would be of three dimensions."""
    assert prediction.predictions.ndim == 2
    return {"tokens": float(len({*prediction.predictions.flatten().tolist()}))}


def test_an_encoder_decoder_that_generates_for_its_metrics(tmp_path: Path) -> None:
    plain, found = (translator(act(T5.seeded()), tmp_path / act.__name__) for act in BOTH)
    plain.train(), found.train()
    assert isinstance(found.model, geminifx.CompiledModule) and found.model.stats.steps > 0
    for entry, right in zip(logged(found), logged(plain), strict=True):
        assert entry == pytest.approx(right, rel=1e-5)
    assert sum("eval_tokens" in entry for entry in logged(plain)) == 2
    assert losses(plain)[0] != losses(plain)[-1] and difference(found.model, plain.model) <= 1e-5
    expected, predicted = plain.predict(lengths(2)), found.predict(lengths(2))
    assert torch.equal(torch.from_numpy(predicted.predictions), torch.from_numpy(expected.predictions))
    best = AutoModelForSeq2SeqLM.from_pretrained(found.state.best_model_checkpoint)
    assert same(best, found.model), "the best is loaded at the end"


@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}],
    ids=lambda changes: str(changes),
)
def test_rows_of_several_lengths(case: Case, changes: dict[str, Any], tmp_path: Path) -> None:
    """Each batch is as long as its longest row; evaluations stand between."""
    given = {"train_dataset": lengths(), "eval_dataset": lengths(1), "eval_strategy": "steps", "eval_steps": 2}
    made = [trainer(act(case.seeded()), tmp_path, data_collator=padded, **given, **changes) for act in BOTH]
    for each in made:
        each.train()
    plain, found = made
    for entry, right in zip(logged(found), logged(plain), strict=True):
        assert entry == pytest.approx(right, rel=0 if case.exact else 1e-4)
    assert difference(found.model, plain.model) <= (0 if case.exact else 1e-4)


# -- adapters ----------------------------------------------------------------------------------------------


def adapted() -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(LLAMA.seeded(), config)


CHECKPOINTS: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True,
}  # fmt: skip


def with_adapters(act: Any, directory: Path) -> Trainer:
    torch.manual_seed(0)
    return trainer(act(adapted()), directory, label_names=["labels"], **CHECKPOINTS)


def test_adapters_are_trained_saved_and_resumed(tmp_path: Path) -> None:
    plain, found = (with_adapters(act, tmp_path / act.__name__) for act in BOTH)
    plain.train(), found.train()
    for entry, right in zip(logged(found), logged(plain), strict=True):
        assert entry == pytest.approx(right, rel=1e-4)
    assert difference(found.model, plain.model) <= 1e-4
    saved = Path(found.args.output_dir) / "checkpoint-2"
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        path.name for path in (Path(plain.args.output_dir) / "checkpoint-2").iterdir()
    ), "the adapter alone"
    resumed = with_adapters(geminifx.compile, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(saved))
    assert losses(resumed) == losses(found) and same(resumed.model, found.model)
    final = Path(found.args.output_dir) / "checkpoint-4"
    loaded = peft.PeftModel.from_pretrained(LLAMA.seeded(), final)
    step = with_adapters(geminifx.compile, tmp_path / "last")
    step._load_from_checkpoint(str(final))
    assert same(step.model, loaded)


# -- a whole fine-tuning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "loads"),
    [
        (GPT2, AutoModelForCausalLM),
        (LLAMA, AutoModelForCausalLM),
        (Case("bert", classifier), None),
    ],
    ids=["gpt2, tied", "llama", "bert"],
)
def test_a_fine_tuning_of_everything_at_once(case: Case, loads: Any, tmp_path: Path) -> None:
    """Two epochs, evaluated, saved, the best kept, and what is saved loads and goes on."""
    rows = {"train_dataset": classified(), "eval_dataset": classified(1), "compute_metrics": accuracy}
    given: dict[str, Any] = rows if loads is None else {"train_dataset": lengths(), "eval_dataset": lengths(1)}
    given |= {} if loads is None else {"data_collator": padded}
    changes = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}
    made = partial(trainer, **given, **changes, load_best_model_at_end=True, save_total_limit=2, warmup_steps=1)
    plain, found = (made(act(case.seeded()), tmp_path / act.__name__) for act in BOTH)
    plain.train(), found.train()
    for entry, right in zip(logged(found), logged(plain), strict=True):
        assert entry == pytest.approx(right, rel=0 if case.exact else 1e-4)
    assert plain.state.best_global_step == found.state.best_global_step
    kind = loads or type(plain.model)
    best = kind.from_pretrained(found.state.best_model_checkpoint)
    assert same(best, found.model) and difference(best, plain.model) <= (0 if case.exact else 1e-4)
    evaluated = found.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(found.state.best_metric)
