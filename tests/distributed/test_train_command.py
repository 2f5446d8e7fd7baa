"""`geminifx train` in two processes: Ctrl-C saves a checkpoint, with which they, or one alone, go on."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from geminifx.compiler.cli.main import app
from trainable import SMALL_OPT
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

SETTINGS = ["small.json", "--data", "data.txt", "--steps", "60", "--batch-size", "4", "--seq-len", "16", "--lr", "0.01"]


def losses(shown: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)/60  loss ([\d.]+)", shown)}


def prepare(dropout: float) -> None:
    Path("small.json").write_text(json.dumps({**SMALL_OPT, "dropout": dropout}))
    Path("data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)


def train_by_two(*words: str, stop: int | None = None, at: int = 12) -> str:
    """What the command shows, which ends as it should; `stop` is a signal that it gets in step `at`."""
    command = [sys.executable, "-m", "geminifx", "train", *SETTINGS, *words, "--parallel", "data=2,zero=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as two:
        shown = ""
        for line in two.stdout:
            shown += line
            if stop is not None and line.startswith(f"step {at}/"):
                two.send_signal(stop)
    assert two.returncode == (0 if stop is None else 130), shown
    assert shown.count("stopped after step") == (stop is not None)
    return shown


@pytest.mark.slow
def test_two_processes_stop_and_go_on_as_if_they_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either signal, of which the second comes when they have gone on from the first."""
    monkeypatch.chdir(tmp_path)
    prepare(dropout=0.2)  # each process drops its own elements
    train_by_two("--output", "whole")
    train_by_two("--output", "parts", stop=signal.SIGINT)
    went_on = train_by_two("--output", "parts", "--resume", stop=signal.SIGTERM, at=36)
    assert 12 < min(losses(went_on)) < 36
    assert min(losses(train_by_two("--output", "parts", "--resume"))) > 36
    whole, parts = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_stop_and_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(dropout=0.0)
    shown = train_by_two("--output", "parts", stop=signal.SIGINT)
    assert "--parallel data=2,zero=1 --resume" in shown
    before = losses(shown)
    one = CliRunner().invoke(app, ["train", *SETTINGS, "--output", "parts", "--resume"])
    assert one.exit_code == 0, one.output
    whole = CliRunner().invoke(app, ["train", *SETTINGS, "--output", "whole"])
    expected, found = losses(whole.output), before | losses(one.output)
    assert 60 in found and 12 in before and found.keys() <= expected.keys()
    # Halves of a batch are added in another order than all of it, and three digits are shown.
    assert all(abs(found[step] - expected[step]) <= 0.002 for step in found), (found, expected)
