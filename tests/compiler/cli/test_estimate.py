"""estimate: what a model would take in each format of its state, from its configuration alone."""

import json
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.cli.main import app
from geminifx.models.low_rank import adapted
from geminifx.models.presets import PRESETS
from torch import nn
from transformers import GPT2Config
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("shared")

TINY = ["estimate", "opt-mini", "--seq-len", "16"]
LORA, QLORA = "LoRA of rank 16, frozen bf16", "LoRA of rank 16, frozen nf4"


def told(*words: str) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(app, [*TINY, *words, "--json"])
    assert result.exit_code == 0, result.output
    return {row["state"]: row for row in json.loads(result.stdout)}


def test_a_row_is_told_for_each_format() -> None:
    rows = told("--device-budget", "1B", "--host-budget", "1GB")
    assert list(rows) == ["exact", "bf16 moments", "int8 moments", "int8 moments, bf16 masters", LORA, QLORA]
    assert all(row["lacking"] == "device" and row["smallest_bytes"] > 0 for row in rows.values())


@pytest.mark.slow
def test_layers_of_gpt2_have_adapters_and_a_format_that_they_lack_is_told(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=32).to_json_file(tmp_path / "config.json")
    words = ["estimate", str(tmp_path), "--seq-len", "16", "--json", "--device-budget", "2GB", "--host-budget", "1GB"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    rows = {row["state"]: row for row in json.loads(result.stdout)}
    layers = ((32, 96), (32, 32), (32, 128), (128, 32))
    assert rows[LORA]["fits"] and rows[LORA]["trained"] == 2 * 16 * sum(map(sum, layers))
    assert not rows[QLORA]["fits"] and "frozen weights of nn.Linear" in rows[QLORA]["reason"]


@pytest.mark.slow
def test_formats_take_less_and_less_and_tell_what_would_do() -> None:
    """With the least budget that is told there is a plan, and with a hundredth less there is none."""
    rows = told("--device-budget", "1.64GB", "--host-budget", "10MB")
    assert list(rows) == ["exact", "bf16 moments", "int8 moments", "int8 moments, bf16 masters", LORA, QLORA] and all(
        row["fits"] for row in rows.values()
    )
    taken = [row["device_bytes"] + row["host_bytes"] for row in rows.values()]
    assert taken[:4] == sorted(taken[:4], reverse=True) and taken[4] < taken[2]
    assert all(row["tokens_per_s"] == pytest.approx(16 / row["step_s"]) for row in rows.values())
    assert rows[LORA]["trained"] < rows["exact"]["trained"] == rows["exact"]["parameters"]
    refused = told("--device-budget", "1B", "--host-budget", "1GB")
    assert not any(row["fits"] for row in refused.values())
    assert {row["lacking"] for row in refused.values()} == {"device"}
    least = max(row["smallest_bytes"] for row in refused.values())
    assert all(row["fits"] for row in told("--device-budget", str(least), "--host-budget", "1GB").values())
    assert not told("--device-budget", str(int(0.99 * least)), "--host-budget", "1GB")["exact"]["fits"]


@pytest.mark.slow
def test_the_command_shows_a_table_of_a_configuration(tmp_path: Path) -> None:
    PRESETS["opt-mini"].config().to_json_file(tmp_path / "config.json")
    words = ["estimate", str(tmp_path), "--seq-len", "16", "--device-budget", "1.54GB", "--host-budget", "1kB"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())  # A title is as wide as its table: a long path breaks it anywhere.
    assert "3.75M parameters, 16 tokens a step" in output and "at the rates of the preset h100-sxm" in output
    assert "would do" in output and LORA in output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device-budget", "much"], "cannot read 'much'"),
        (["--host-budget", "50%"], "is a percentage of an unknown total"),
        (["--seq-len", "100000"], "--seq-len 100000 is longer than the 256 positions of the model"),
        (["--rates", "rtx409"], "rates='rtx409'"),
    ],
)
def test_errors_are_one_panel(words: list[str], says: str) -> None:
    result = CliRunner().invoke(app, [*TINY, *words], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and says in result.output and "Traceback" not in result.output


def test_adapters_are_beside_every_linear_layer_of_a_block() -> None:
    with geminifx.init_empty():
        model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU()) for _ in range(2))})
    adapted(model, ("blocks.0", "blocks.1"), 3)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{i}.0.{name}.weight": shape for i in range(2) for name, shape in
                       (("down", (3, 4)), ("up", (6, 3)))}  # fmt: skip
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
