"""Hugging Face's Trainer on plain and compiled models: tiny models, rows of tokens, and what a run logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import geminifx
import torch
from more_models import SIZES
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from zoo import VOCAB

ROWS, LENGTH, CLASSES = 16, 8, 3
Row = dict[str, Any]


def rows(seed: int = 0, number: int = ROWS) -> list[Row]:
    """For language models: labels are the tokens."""
    ids = torch.randint(3, VOCAB, (number, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def classified(seed: int = 0, number: int = ROWS) -> list[Row]:
    """For classification: the first token tells the class. Half of the rows are padded."""
    found = []
    for i, row in enumerate(rows(seed, number)):
        mask = row["attention_mask"].clone()
        mask[LENGTH - 3 * (i % 2) :] = 0
        found.append({**row, "attention_mask": mask, "labels": int(row["input_ids"][0]) % CLASSES})
    return found


def classifier() -> nn.Module:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": VOCAB, "intermediate_size": 64, "max_position_embeddings": 32, "num_labels": CLASSES}
    return BertForSequenceClassification(BertConfig(**SIZES, **sizes, **rates)).train()


def accuracy(prediction: Any) -> dict[str, float]:
    """For compute_metrics=, which gets the logits of all rows."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def as_they_are(model: nn.Module) -> nn.Module:
    return model


BOTH: tuple[Callable[[nn.Module], nn.Module], ...] = (as_they_are, geminifx.compile)
"""What is done to a model before it is trained: nothing, and what is tested."""


def trainer(model: nn.Module, directory: Path, **changes: Any) -> Trainer:
    """Its arguments are as small as they go; `changes` are TrainingArguments, but for those that Trainer takes."""
    own = {"train_dataset", "eval_dataset", "data_collator", "compute_metrics", "optimizers", "callbacks"}
    arguments = {
        "output_dir": str(directory), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 4,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "save_strategy": "no", "logging_steps": 1,
        "learning_rate": 1e-2, "weight_decay": 0.1, "seed": 1,
    }  # fmt: skip
    chosen = TrainingArguments(**{**arguments, **{k: v for k, v in changes.items() if k not in own}})
    given = {"train_dataset": rows(), "eval_dataset": rows(1), **{k: v for k, v in changes.items() if k in own}}
    return Trainer(model=model, args=chosen, **given)


def logged(trained: Trainer) -> list[dict[str, Any]]:
    """All that was logged, but for how long it took."""
    clocks = ("runtime", "per_second", "flos")
    return [{k: v for k, v in entry.items() if not k.endswith(clocks)} for entry in trained.state.log_history]


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def same(model: Any, other: Any) -> bool:
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def difference(model: Any, other: Any) -> float:
    """The largest one of any parameter's elements."""
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    apart: list[Tensor] = [(first[name].float() - second[name].float()).abs().max() for name in first]
    return max(value.item() for value in apart)
