"""simulate: a schedule on a clock, as a table and as a trace."""

import json
from pathlib import Path

import pytest
from geminifx.compiler.cli.main import app
from geminifx.compiler.planner.pipeline.schedules import Shape, make_schedule
from geminifx.runtime.isa.schedule import Schedule
from transformers import OPTConfig
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("shared")


def simulate(*options: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["simulate", *map(str, options)])
    return result.exit_code, result.output


def test_a_schedule_is_shown_with_what_it_takes(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    code, output = simulate("--ranks", 2, "--microbatches", 4, "--forward-ms", 2, "--message-ms", 0.5, "--trace", trace)
    assert code == 0
    *text, summary = output.splitlines()[:4]
    assert Schedule.parse("\n".join(text)) == make_schedule("1f1b", Shape(2, 4))
    assert summary == "a step takes 22.0 ms, of which ranks are idle for 27.3%"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert rows == [["0", "0", "6.00 ms", "2"], ["1", "1", "6.00 ms", "1"]]
    assert len(json.loads(trace.read_text())["traceEvents"]) == 1 + 2 * 2 + 16 + 2 * 8


def test_a_loss_that_is_read_costs_nothing() -> None:
    shape = ("--schedule", "zbv", "--stages-per-rank", 2)
    assert "a step takes 51.0 ms" in simulate(*shape)[1]
    assert "a step takes 51.0 ms" in simulate(*shape, "--loss-awaited")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--schedule", "pipedream"), "there is no schedule 'pipedream'; expected one of gpipe, 1f1b"),
        (("--schedule", "zbv"), "it has 2 stages per rank, not 1"),
        (
            ("--ranks", 512, "--microbatches", 4096),
            "512 stages with 4096 microbatches need 2,097,152 forwards; expected",
        ),
        (("--input-ms", "inf"), "input_s=inf; expected 0 or more"),
        (("--trace", "no/such/directory/trace.json"), "No such file or directory"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options: tuple[object, ...], message: str) -> None:
    code, output = simulate(*options)
    told = " ".join(output.replace("│", " ").split())
    assert code == 2 and message in told


OPT = OPTConfig(
    num_hidden_layers=8, hidden_size=64, num_attention_heads=4, ffn_dim=256, word_embed_proj_dim=64, vocab_size=512,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "opt.json"
    OPT.to_json_file(file)
    return file


def test_of_a_model_all_ranks_of_its_pipeline_are_shown(config: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    words = ("--world-size", 8, "--parallel", "pipeline=4,data=2", "--batch-size", 16, "--schedule", "zb1p")
    code, output = simulate(config, *words, "--trace", trace)
    assert code == 0, output
    assert "of 8 processes on one node of 8" in output
    assert "data 2, pipeline 4 by zb1p, 8 microbatches: a step of" in output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [[str(rank)] * 2 for rank in range(4)]
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["name"] == "sums and updates"} == {0, 1, 2, 3}
    assert sum(event["ph"] == "X" for event in events) == 4 * 8 * 3 + 4


def test_of_a_model_the_fastest_way_is_taken_where_none_is_named(config: Path) -> None:
    code, output = simulate(config, "--cluster", "8-nvlink", "--batch-size", 16)
    assert code == 0, output
    assert "ways to share the work fit" in output and output.count("the next best for 8 processes") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", 2), "--ranks does not apply to a model"),
        (("--world-size", 4, "--cluster", "8-pcie"), "--world-size 4, but the cluster has 8 devices"),
        (("--world-size", 4, "--parallel", "data=8"), "the product of the degrees must be the size of the world"),
        (("--parallel", "data=4,pipeline=2", "--batch-size", 10), "cannot be divided into 4 batches of 4 microbatches"),
        (
            ("--world-size", 16, "--parallel", "pipeline=16", "--batch-size", 32),
            "16 stages need at least 16 blocks, but the model has 8",
        ),
        (
            ("--world-size", 4, "--parallel", "pipeline=4", "--schedule", "zbv", "--batch-size", 8),
            "it has 2 stages per rank, not 1",
        ),
        (("--schedule", "zbv"), "--schedule orders the pipeline of --parallel"),
        (("--parallel", "data=2", "--device-budget", "1kB"), "needs the least memory per device"),
        (("--parallel", "tensor=3d:8"), "the mode 3d is not modelled"),
        (("--parallel", "tensor=1d:2,sequence"), "tensor=sequence is not modelled"),
        (("--parallel", "data=2", "--schedule", "zb1p"), "--schedule zb1p is for a pipeline, but --parallel has none"),
        (
            ("--world-size", 16, "--parallel", "tensor=1d:16", "--batch-size", 1),
            "heads cannot be divided over 16 processes",
        ),
    ],
)
def test_what_makes_no_sense_of_a_model_is_refused(config: Path, options: tuple[object, ...], message: str) -> None:
    code, output = simulate(config, *options)
    told = " ".join(output.replace("│", " ").split())
    assert code == 2 and message in told


def test_a_schedule_alone_has_no_world() -> None:
    code, output = simulate("--ranks", 2, "--world-size", 4)
    assert code == 2 and "--world-size does not apply to a schedule alone" in " ".join(output.split())
