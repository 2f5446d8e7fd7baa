"""The command: its points and options, the CSV that all results go to, and what a worker's end means."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import step_time
from processes import Output, outcome
from results_csv import COLUMNS, append, check_columns, commit_of, provenance, row
from step_report import cells, label
from step_time import parse_args, point, task_of, ways

SCRIPT = Path(step_time.__file__)


def refused(words, capsys):
    with pytest.raises(SystemExit):
        parse_args(words)
    return capsys.readouterr().err


# -- the command line ------------------------------------------------------------------------------------------


def test_points_name_any_model(tmp_path):
    config = tmp_path / "a:b" / "config.json"
    config.parent.mkdir()
    config.write_text('{"model_type": "llama"}')
    assert [point(text) for text in ("1.3b:8", "opt-1.3b:8", "llama-3b:8", f"{config}:2")] == [
        ("opt-1.3b", 8), ("opt-1.3b", 8), ("llama-3b", 8), (str(config), 2)]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), [
    ("--points 1.3b", "no model:batch, such as 1.3b:8"),
    ("--points 1.3b:many", "no model:batch"),
    ("--points 9b:8", "there is no model '9b'"),
    ("--points 1.3b:0", "a batch of 0; expected 1 or more"),
    ("--accumulate 0", "--accumulate must be 1 or more"),
    ("--microbatches 0", "--microbatches must be 1 or more"),
    ("--dropout 1", "--dropout is a probability"),
    ("--points vit-l:8 --pad", "--pad is for sequences; vit-l reads images"),
    ("--nprocs 2 --systems ours compile", "compile is measured in one process only"),
    ("--plan-only --systems plain", "--plan-only is for ours, ours-default, ours-clip, ours-torch; plain has no plan"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(words, says, capsys):
    assert says in " ".join(refused(words.split(), capsys).split())


def test_options_make_the_task():
    words = (
        "--points llama-3b:8 --accumulate 8 --dropout 0.1 --pad --budget 24GiB --host-budget 100GiB "
        "--recompute 6 --offload 4 --parallel zero=3 data=2 --systems ours plain"
    )
    args = parse_args(words.split())
    task = task_of(args, *args.points[0], "zero=3")
    assert (task.model, task.batch, task.seq, task.accumulate) == ("llama-3b", 8, 1024, 8)
    assert (task.dropout, task.pad, task.budget, task.microbatches) == (0.1, True, "24GiB", None)
    assert (task.declared.recompute, task.declared.offload, task.declared.degrees) == ("6", "4", {"zero": 3})
    assert ways(args) == [("ours", "zero=3"), ("ours", "data=2"), ("plain", None)]
    assert task_of(parse_args(["--budget", "none"]), "opt-mini", 1, None).budget is None


def test_the_systems_by_default():
    assert parse_args([]).systems == ["ours", "fsdp2", "plain"]
    assert parse_args(["--plan-only"]).systems == ["ours"]


def test_the_documented_commands_are_understood():
    text = (SCRIPT.parent.parent / "docs" / "measured.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line.split("#")[0].split()[2:] for line in text.splitlines() if line.startswith("python step_time.py")]
    assert len(commands) > 5
    for words in commands:
        assert parse_args(words).points


# -- results ---------------------------------------------------------------------------------------------------


def test_results_are_appended_below_one_header(tmp_path):
    file = tmp_path / "results.csv"
    for losses in ([7.5, 7.25], [6.5, 6.25]):
        origin = provenance(["step_time.py", "--points", "mini:2"])
        figures = {"step_s": 0.5, "losses": losses, "host_rss_bytes": 20, "stats": {"device_peak_bytes": 10}}
        result = {**origin, **figures, "system": "ours", "all_steps_s": [1.0]}
        check_columns(file)
        append(file, row(result))
    append(file, row({"system": "plain", "error": 'out of memory, "all" of it\nreally'}))
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert file.read_text(encoding="utf-8").startswith(",".join(COLUMNS) + "\n")
    assert [r["first_loss"] for r in rows] == ["7.5", "6.5", ""] and [r["last_loss"] for r in rows][:2] == [
        "7.25",
        "6.25",
    ]
    assert (rows[0]["device_peak_bytes"], rows[0]["host_bytes"], rows[0]["step_s"]) == ("10", "20", "0.5")
    assert rows[0]["command"] == "step_time.py --points mini:2" and int(rows[0]["cpus"]) >= 1 and rows[0]["torch"]
    assert rows[2]["error"] == 'out of memory, "all" of it\nreally'


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("system,seconds\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"other columns than are written now .*seconds.*nothing was measured"):
        check_columns(file)
    assert file.read_text(encoding="utf-8") == "system,seconds\n"


def test_the_commit_is_recorded_and_whether_code_was_changed(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert commit_of(tmp_path) is None
    git("init")
    for name in ("code.py", "results.csv"):
        (tmp_path / name).write_text("1\n")
    git("add", ".")
    git("commit", "-m", "one")
    clean = commit_of(tmp_path)
    assert len(clean) == 40
    (tmp_path / "results.csv").write_text("2\n")
    (tmp_path / "new.txt").write_text("2\n")
    assert commit_of(tmp_path) == clean
    (tmp_path / "code.py").write_text("2\n")
    assert commit_of(tmp_path) == f"{clean}+dirty"
    (tmp_path / "inner").mkdir()
    assert commit_of(tmp_path / "inner") == f"{clean}+dirty"


def test_a_worker_s_end_is_the_result_s():
    def said(*lines):
        output = Output()
        output.read(lines)
        return output

    done = said(
        'RESULT {"gpu": "H"}\n', "step 0\n", 'RESULT {"step_s": 1, "done": true}\n', 'RESULT {"error": "trace"}\n'
    )
    assert outcome(done, 0) == {"gpu": "H", "step_s": 1}
    killed = said('RESULT {"gpu": "H", "planned_peak_bytes": 5}\n', "step 0\n")
    assert outcome(killed, -9) == {
        "gpu": "H", "planned_peak_bytes": 5,
        "error": "ended by SIGKILL, most likely for want of host memory; last line: step 0",
    }  # fmt: skip
    assert outcome(said("busy\n"), None)["error"] == "timed out; last line: busy"
    assert outcome(said('RESULT {"error": "no"}\n'), 0) == {"error": "no"}


def test_the_table_tells_points_apart():
    plain = {"model": "opt-1.3b", "batch": 8, "seq": 1024}
    assert label(plain) == "opt-1.3b, 8 x 1024"
    assert label({**plain, "accumulate": 8, "dropout": 0.1, "pad": True}) == (
        "opt-1.3b, 8 x 1024, 8 backwards, dropout 0.1, padded"
    )
    assert label({"model": "vit-l", "batch": 8, "seq": None}) == "vit-l, 8 images"
    assert cells(
        {"planned_peak_bytes": 2**30, "planned_host_bytes": 2**31, "planned_step_s": 0.1234, "compile_s": 3.0}
    )[-1] == ("planned step 0.123 s, planned peak 1.0 GiB, host 2.0 GiB, compiled in 3.0 s")


@pytest.mark.slow
def test_a_call_measures_and_writes_down(tmp_path):
    """The whole command, for a system that runs at once and one that is refused."""
    file = tmp_path / "results.csv"
    words = ["--points", "llama-mini:1", "--seq", "8", "--steps", "4", "--budget", "none", "--accumulate", "2",
             "--systems", "plain", "roundpipe", "--csv", str(file)]  # fmt: skip
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with file.open(newline="", encoding="utf-8") as lines:
        plain, roundpipe = csv.DictReader(lines)
    assert (plain["system"], plain["model"], plain["tokens"]) == ("plain", "llama-mini", "16")
    assert (plain["steps"], plain["steps_counted"]) == ("4", "2")
    assert float(plain["step_s"]) > 0 and float(plain["tokens_per_s"]) > 0 and int(plain["host_bytes"]) > 0
    assert plain["commit"] != "" and plain["error"] == "" and float(plain["first_loss"]) > 0
    assert roundpipe["error"] and roundpipe["step_s"] == ""
