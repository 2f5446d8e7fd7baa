"""`geminifx train` in two processes: Ctrl-C saves a checkpoint, with which one process goes on as if it were alone."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from geminifx.compiler.cli.main import app
from trainable import SMALL_OPT
from typer.testing import CliRunner

SETTINGS = ["small.json", "--data", "data.txt", "--steps", "60", "--batch-size", "4", "--seq-len", "16", "--lr", "0.01"]


def losses(shown: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)/60  loss ([\d.]+)", shown)}


def test_two_processes_stop_and_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.json").write_text(json.dumps({**SMALL_OPT, "dropout": 0.0}))
    Path("data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    command = [sys.executable, "-m", "geminifx", "train", *SETTINGS, "--output", "parts", "--parallel", "data=2,zero=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as two:
        shown = ""
        for line in two.stdout:
            shown += line
            if line.startswith("step 12/"):
                two.send_signal(signal.SIGINT)
    assert two.returncode == 130, shown
    assert shown.count("stopped after step") == 1 and "--parallel data=2,zero=1 --resume" in shown
    before = losses(shown)
    one = CliRunner().invoke(app, ["train", *SETTINGS, "--output", "parts", "--resume"])
    assert one.exit_code == 0, one.output
    whole = CliRunner().invoke(app, ["train", *SETTINGS, "--output", "whole"])
    expected, found = losses(whole.output), before | losses(one.output)
    assert 60 in found and 12 in before and found.keys() <= expected.keys()
    # Halves of a batch are added in another order than all of it, and three digits are shown.
    assert all(abs(found[step] - expected[step]) <= 0.002 for step in found), (found, expected)
