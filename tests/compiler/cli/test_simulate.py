"""simulate: a schedule on a clock, as a table and as a trace."""

import json
from pathlib import Path

import pytest
from geminifx.compiler.cli.main import app
from geminifx.compiler.planner.pipeline.schedules import Shape, make_schedule
from geminifx.runtime.isa.schedule import Schedule
from typer.testing import CliRunner


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


def test_a_loss_that_is_read_takes_longer() -> None:
    shape = ("--schedule", "zbv", "--stages-per-rank", 2)
    assert "a step takes 51.0 ms" in simulate(*shape)[1]
    assert "a step takes 54.0 ms" in simulate(*shape, "--loss-awaited")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--schedule", "pipedream"), "there is no schedule 'pipedream'; expected one of gpipe, 1f1b"),
        (("--schedule", "zbv"), "it has 2 stages per rank, not 1"),
        (
            ("--ranks", 512, "--microbatches", 4096),
            "512 stages with 4096 microbatches make 2,097,152 forwards; expected",
        ),
        (("--input-ms", "inf"), "input_s=inf; expected 0 or more"),
        (("--trace", "no/such/directory/trace.json"), "No such file or directory"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options: tuple[object, ...], message: str) -> None:
    code, output = simulate(*options)
    told = " ".join(output.replace("│", " ").split())
    assert code == 2 and message in told
