"""The command line on a stand-in for the compiler: options, errors, reports, resuming."""

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from geminifx.compiler.cli.baseline import plain_peak_bytes
from geminifx.compiler.cli.job import TrainOptions
from geminifx.compiler.cli.main import app
from geminifx.models.presets import load_model
from geminifx.passes.program.estimate import Estimate
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.request import Request
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.errors import BudgetError
from trainable import SMALL_OPT, ClippedAdamW, PlainCheckpoints
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result


class Compiled(torch.nn.Module):
    """Runs the model as it is and claims a plan and statistics; a signal comes in call `interrupt_at`."""

    ranks = Ranks()

    def __init__(self, model: Any, options: dict[str, Any], interrupt_at: int | None, by: int) -> None:
        super().__init__()
        self.model, self.options, self.interrupt_at, self.by, self.calls = model, options, interrupt_at, by, 0
        self.optimizers: list[ClippedAdamW] = []
        self.plan = Plan(Request(options["placement"], 1000), estimate=Estimate(peak_bytes=900))
        self.stats = SimpleNamespace(
            device_peak_bytes=950, host_peak_bytes=4000, to_device_bytes=70_000, to_host_bytes=60_000
        )

    def forward(self, **batch: torch.Tensor) -> Any:
        self.calls += self.training
        if self.calls == self.interrupt_at:
            os.kill(os.getpid(), self.by)
        return self.model(**batch)

    def optimizer(self, kind: type, params: Any, *, max_grad_norm: float, **hyper: Any) -> ClippedAdamW:
        self.optimizers.append(ClippedAdamW(kind, params, max_grad_norm, **hyper))
        return self.optimizers[-1]

    def first_nonfinite(self, **_: torch.Tensor) -> str | None:
        return None


class Bench:
    """A directory with data and a config file, and a compiler that takes note of how it is called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls: list[Compiled] = []
        self.interrupt_at: int | None = None
        self.interrupt_by: int = signal.SIGINT
        (directory / "data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
        (directory / "tiny.json").write_text(json.dumps(SMALL_OPT))

    def compile(self, model: Any, **options: Any) -> Compiled:
        self.calls.append(Compiled(model, options, self.interrupt_at, self.interrupt_by))
        return self.calls[-1]

    def train(self, *words: str) -> Result:
        fixed = ["--data", "data.txt", "--steps", "4", "--batch-size", "2", "--seq-len", "16"]
        return CliRunner().invoke(app, ["train", *words, *fixed])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    bench = Bench(tmp_path)
    monkeypatch.setattr("geminifx.compiler.cli.job.compile", bench.compile)
    monkeypatch.setattr("geminifx.compiler.cli.job.RunDirectory", PlainCheckpoints)
    return bench


def _says(result: Result) -> str:
    """All that was shown, without the panel's frame and line breaks."""
    return " ".join(re.sub("[\u2500-\u257f]", " ", result.output).split())


def test_trains_a_config_file_and_reports(bench: Bench) -> None:
    result = bench.train("tiny.json", "--device-budget", "1GB", "--placement", "cpu", "--dump", "programs")
    assert result.exit_code == 0, result.output
    options = bench.calls[0].options
    assert (options["device_budget"], options["placement"], options["dump"]) == ("1GB", "cpu", "programs")
    assert options["example_inputs"]["input_ids"].shape == (2, 16)
    shown = _says(result)
    assert re.search(r"step 4/4 loss \d\.\d+ .* tokens/s device 950 B / 1\.00 kB host 4\.00 kB", shown)
    assert re.search(r"held-out perplexity: [\d,.]+ before, [\d,.]+ after", shown)
    assert re.search(r"device, planned peak 900 B 90%", shown)
    assert "plain PyTorch" not in shown and "saved to runs/tiny" in shown
    assert len(AutoTokenizer.from_pretrained("runs/tiny")("quick fox")["input_ids"]) > 1


def test_formats_of_training_state_are_the_optimizers(bench: Bench) -> None:
    result = bench.train("tiny.json", "--moments", "int8", "--masters", "bf16-stochastic", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert [optimizer.stored for optimizer in bench.calls[0].optimizers] == [("int8", "bf16-stochastic", 3)]
    resumed = bench.train("tiny.json", "--resume")
    assert resumed.exit_code == 2 and "moments was int8, now exact" in _says(resumed)


def test_a_checkpoint_is_fine_tuned_further_elsewhere(bench: Bench) -> None:
    assert bench.train("tiny.json").exit_code == 0
    before = AutoModelForCausalLM.from_pretrained("runs/tiny").state_dict()
    result = bench.train("runs/tiny", "--lr", "0.01")
    assert result.exit_code == 0, result.output
    after = AutoModelForCausalLM.from_pretrained("runs/tiny-tuned").state_dict()
    kept = AutoModelForCausalLM.from_pretrained("runs/tiny").state_dict()
    assert all(torch.equal(before[name], kept[name]) for name in before)
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_without_a_model_the_budget_is_half_of_plain_pytorch(bench: Bench) -> None:
    result = bench.train("--recompute", "all", "--microbatches", "2")
    assert result.exit_code == 0, result.output
    budget = int(bench.calls[0].options["device_budget"])
    parameters = sum(p.numel() for p in bench.calls[0].parameters())
    # Weights, gradients and two moments, and something for the activations.
    assert 8 * parameters < budget < 16 * parameters
    assert (bench.calls[0].options["recompute"], bench.calls[0].options["microbatches"]) == ("all", 2)
    shown = _says(result)
    assert "the device budget is half of it" in shown and "plain PyTorch, measured peak" in shown
    assert Path("runs/opt-mini/config.json").exists()


def test_measuring_plain_pytorch_leaves_the_model_alone() -> None:
    model = load_model("opt-mini")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    ids = torch.arange(32).view(2, 16)
    assert plain_peak_bytes(model, {"input_ids": ids, "labels": ids}) > 16 * model.num_parameters()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_shown_command_resumes(bench: Bench, number: int) -> None:
    assert bench.train("tiny.json", "--output", "whole").exit_code == 0
    bench.interrupt_at, bench.interrupt_by = 2, number
    stopped = bench.train("tiny.json", "--output", "my run", "--save-every", "10min")
    assert stopped.exit_code == 130
    assert "stopped after step 2 and saved" in _says(stopped)
    settings = "--data data.txt --steps 4 --batch-size 2 --seq-len 16 --save-every 10min --output 'my run'"
    assert f"geminifx train tiny.json {settings} --resume" in _says(stopped)
    bench.interrupt_at = None
    resumed = bench.train("tiny.json", "--output", "my run", "--resume")
    assert resumed.exit_code == 0, resumed.output
    whole, parts = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("whole", "my run"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tiny.json", "--device-budget", "24 potatoes"], "device_budget: unknown unit 'potatoes'"),
        (["tiny.json", "--device-budget", "0"], "at least one byte"),
        (["tiny.json", "--host-budget", "-1GB"], "host_budget: a memory budget must be at least one byte"),
        (["tiny.json", "--placement", "gpu"], "placement='gpu'; expected one of 'cuda', 'cpu', 'auto'"),
        (["tiny.json", "--precision", "int4"], "precision='int4'; expected one of None, 'fp32', 'bf16', 'fp16'"),
        (["tiny.json", "--lr", "nan"], "expected a positive number"),
        (["tiny.json", "--moments", "int4"], "moments='int4'; expected one of exact, bf16, int8"),
        (["tiny.json", "--data", "none.txt"], "there is no data at none.txt"),
        (["tiny.json", "--data", "bad.txt"], "bad.txt is not UTF-8: byte 0xff at offset 3 (line 1)"),
        (["tiny.json", "--data", "empty.txt"], "empty.txt contains no text"),
        (["tiny.json", "--data", "bad.csv"], "bad.csv line 2 has 1 field(s); expected the 2 of line 1 (text, n)"),
        (["tiny.json", "--data", "chat.jsonl"], "chat.jsonl line 1 is a chat, but a model with random weights has no"),
        (["tiny.json", "--data", "chat.jsonl", "--fields", "body"], "--fields 'body': 'body' cannot be parsed"),
        (["tiny.json", "--fields", "text=body"], "data.txt is text, which has no fields; leave --fields out"),
        (["tiny.json", "--steps", "3", "--epochs", "2"], "--steps and --epochs both set the length of the training"),
        (["tiny.json", "--batch-size", "1000000000"], "a batch of 1,000,000,000 blocks is larger than the"),
        (["tiny.json", "--save-every", "often"], "--save-every: cannot read 'often' as a duration"),
        (["tiny.json", "--save-every", "-1"], "--save-every: cannot read '-1' as a duration"),
        (["tiny.json", "--seq-len", "65"], "--seq-len 65 is longer than the 64 positions"),
        (["tiny.json", "--resume"], "there is no checkpoint to resume in runs/tiny"),
        (["tiny.json", "--output", "data.txt"], "data.txt is a file"),
        (["tiny.json", "--output", "data.txt/run"], "data.txt/run cannot be written to"),
        (["./nowhere"], "there is nothing at ./nowhere; expected a preset (opt-mini, opt-125m"),
    ],
)
def test_errors_are_one_panel_and_no_traceback(bench: Bench, words: list[str], says: str) -> None:
    (bench.directory / "bad.txt").write_bytes(b"abc\xff")
    (bench.directory / "empty.txt").write_text("")
    (bench.directory / "bad.csv").write_text("text,n\none")
    (bench.directory / "chat.jsonl").write_text('{"messages": [{"role": "assistant", "content": "hi"}]}')
    fixed = ([] if "--steps" in words else ["--steps", "1"]) + ([] if "--data" in words else ["--data", "data.txt"])
    fixed += [] if "--seq-len" in words else ["--seq-len", "16"]
    result = CliRunner().invoke(app, ["train", *words, *fixed], terminal_width=200)
    assert result.exit_code == 2, result.output
    assert says in _says(result) and "Traceback" not in result.output


def test_epochs_are_counted_in_steps_and_resumed_exactly(bench: Bench) -> None:
    words = ["train", "tiny.json", "--data", "data.txt", "--epochs", "2", "--batch-size", "4", "--seq-len", "64"]
    whole = CliRunner().invoke(app, [*words, "--output", "whole"])
    assert whole.exit_code == 0, whole.output
    blocks = int(re.search(r"(\d+) blocks of 64 tokens to train on", _says(whole))[1])
    steps = -(-2 * blocks // 4)
    assert f"2 epoch(s) are {steps} steps of 4 blocks" in _says(whole) and bench.calls[0].calls == steps
    bench.interrupt_at = steps // 2
    stopped = CliRunner().invoke(app, [*words, "--output", "parts"])
    assert stopped.exit_code == 130 and "--epochs 2 " in _says(stopped)
    bench.interrupt_at = None
    resumed = CliRunner().invoke(app, [*words, "--output", "parts", "--resume"])
    assert resumed.exit_code == 0 and bench.calls[2].calls == steps - steps // 2
    whole, parts = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_chats_are_learned_where_the_tokenizer_has_a_template(bench: Bench) -> None:
    assert bench.train("tiny.json").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained("runs/tiny")
    turns = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}]
    Path("chat.jsonl").write_text("\n".join([json.dumps({"talk": turns})] * 12))
    words = ["train", "runs/tiny", "--data", "chat.jsonl", "--steps", "2", "--batch-size", "2", "--seq-len", "64"]
    words += ["--fields", "messages=talk"]
    assert "chat.jsonl line 1 is a chat, but the tokenizer has no chat template" in _says(
        CliRunner().invoke(app, words)
    )
    for says, content in ((True, "{{ m.content }}"), (False, "{% generation %}{{ m.content }}{% endgeneration %}")):
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>" + content + "{% endfor %}"
        tokenizer.save_pretrained("runs/tiny")
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert "chat.jsonl: 12 chats; " in _says(result)
        assert ("does not mark the assistant's turns" in _says(result)) == says
        labels = bench.calls[-1].options["example_inputs"]["labels"]
        assert (labels == -100).any() and (labels != -100).any()


def test_a_compiler_error_is_shown_as_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BudgetError("the plan needs at least [1.2 GB]")

    monkeypatch.setattr("geminifx.compiler.cli.job.compile", refuse)
    result = bench.train("tiny.json", "--device-budget", "1GB")
    assert result.exit_code == 2
    assert "the plan needs at least [1.2 GB]" in _says(result)


def test_a_model_without_its_tokenizer_is_named(bench: Bench) -> None:
    load_model("tiny.json").save_pretrained("bare")
    result = bench.train("bare")
    assert result.exit_code == 2
    assert "bare has no tokenizer; a trained model needs" in _says(result)


def test_the_output_never_is_the_directory_the_model_came_from() -> None:
    assert TrainOptions().directory == Path("runs/opt-mini")
    assert TrainOptions(model="runs/opt-mini").directory == Path("runs/opt-mini-tuned")
    assert TrainOptions(model="facebook/opt-125m").directory == Path("runs/opt-125m-tuned")
    assert TrainOptions(model="opt-125m").directory == Path("runs/opt-125m")
    assert TrainOptions(model="configs/x.json", output=Path("here")).directory == Path("here")


def test_version_and_help() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and re.fullmatch(r"geminifx \d+\.\d+\.\d+\n", result.output)
    assert "--device-budget" in CliRunner().invoke(app, ["train", "--help"], terminal_width=120).output
