"""`geminifx train` as a newcomer types it, shortened: a compiled run, its checkpoint, a further run."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from geminifx.compiler.cli.display import StepProgress
from geminifx.compiler.cli.main import app
from geminifx.models.recipe.recipe import StepInfo
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

SMALL = {
    "model_type": "opt",
    "vocab_size": 300,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.1,
}


def _bytes(shown: str, row: str) -> float:
    """Return the bytes in a row of the memory table."""
    found = re.search(rf"{row}\W+([\d.]+) (B|kB|MB|GB)", shown)
    assert found is not None, shown
    return float(found[1]) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[found[2]]


@pytest.mark.slow
def test_train_and_train_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", "--steps", "12"], terminal_width=120)
    assert result.exit_code == 0, result.output
    budget, plain = (
        _bytes(result.output, "device, budget"),
        _bytes(result.output, "plain PyTorch, measured peak"),
    )
    measured = _bytes(result.output, "device, measured peak")
    # Three digits are shown.
    assert budget <= 0.505 * plain and measured <= 1.005 * budget
    before, after = (float(x.replace(",", "")) for x in re.findall(r"([\d,.]+) (?:before|after)", result.output)[:2])
    assert after < 0.75 * before

    model = AutoModelForCausalLM.from_pretrained("runs/opt-mini")
    tokenizer = AutoTokenizer.from_pretrained("runs/opt-mini")
    # Weights, gradients and AdamW's two moments: the training state alone is more than the budget.
    assert 16 * model.num_parameters() > 1.1 * budget
    assert len(tokenizer) == model.config.vocab_size == 2048

    further = ["train", "runs/opt-mini", "--steps", "2", "--batch-size", "2", "--seq-len", "64"]
    result = CliRunner().invoke(app, further, terminal_width=120)
    assert result.exit_code == 0, result.output
    start = float(re.search(r"([\d,.]+) before", result.output)[1].replace(",", ""))
    # Other blocks, and shorter ones: about as perplexing as when the first run ended.
    assert start < 1.3 * after
    assert (tmp_path / "runs" / "opt-mini-tuned" / "config.json").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_is_located_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--steps", "5", "--lr", "1e30"]
    result = CliRunner().invoke(app, words, terminal_width=400)
    assert result.exit_code == 2, result.output
    shown = " ".join(re.sub("[\u2500-\u257f]", " ", result.output).split())
    assert re.search(r"the loss of step 2 is nan; the first value that is not finite comes from model\.decoder", shown)
    assert not (tmp_path / "runs" / "opt-mini").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.json").write_text(json.dumps(SMALL))
    Path("data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    losses: list[float] = []
    stop_after: list[int] = []

    class Watched(StepProgress):
        def __call__(self, info: StepInfo) -> None:
            super().__call__(info)
            losses.append(info.loss)
            if info.step in stop_after:
                os.kill(os.getpid(), signal.SIGINT)

    def train(*words: str) -> tuple[int, list[float]]:
        losses.clear()
        settings = [
            "--data",
            "data.txt",
            "--steps",
            "6",
            "--batch-size",
            "2",
            "--seq-len",
            "16",
            "--lr",
            "0.01",
            "--precision",
            precision,
        ]
        result: Any = CliRunner().invoke(app, ["train", "small.json", *settings, *words])
        return result.exit_code, list(losses)

    monkeypatch.setattr("geminifx.compiler.cli.job.StepProgress", Watched)
    code, whole = train("--output", "whole")
    assert code == 0 and len(whole) == 6
    stop_after.append(3)
    code, first = train("--output", "parts", "--resume", "auto")  # there is nothing yet
    assert code == 130 and len(first) == 3
    code, second = train("--output", "parts", "--resume")
    assert code == 0 and first + second == whole
    code, third = train("--output", "parts", "--resume", "auto")
    assert code == 0 and third == []  # it was done
    ours, theirs = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
