"""save_checkpoint(background=True): what it saves is of the moment of the call, whole or not at all, and no failure is
lost."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
import zoo
from geminifx.runtime.isa.errors import CheckpointError
from geminifx.runtime.state_io.filesystem import Writer
from saving import OPTIMIZERS, compiled, same, train, values


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written until it is set."""
    opened, write_data = threading.Event(), Writer.write_data

    def held(*arguments: Any) -> Any:
        assert opened.wait(60)
        return write_data(*arguments)

    monkeypatch.setattr(Writer, "write_data", held)
    return opened


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_saved_is_of_the_moment_of_the_call(
    tmp_path: Path, gate: threading.Event, precision: str, kind: str
) -> None:
    model = compiled(precision=precision)
    optimizer = OPTIMIZERS[kind](model)
    train(model, optimizer)
    extra = {"steps": [3]}
    saving = geminifx.save_checkpoint(model, optimizer, tmp_path / "saved", extra, background=True)
    expected, losses = values(model), train(model, optimizer)
    extra["steps"].append(6)
    assert not saving.done() and not (tmp_path / "saved").exists()
    gate.set()
    saving.result()
    other = compiled(seed=1, precision=precision)
    other_optimizer = OPTIMIZERS[kind](other)
    assert geminifx.load_checkpoint(other, other_optimizer, tmp_path / "saved") == {"steps": [3]}
    assert same(values(other), expected)
    assert train(other, other_optimizer) == losses
    assert os.listdir(tmp_path) == ["saved"]


def test_it_has_the_files_of_another_save(tmp_path: Path) -> None:
    model = compiled()
    optimizer = OPTIMIZERS["own"](model)
    train(model, optimizer)
    geminifx.save_checkpoint(model, optimizer, tmp_path / "one")
    geminifx.save_checkpoint(model, optimizer, tmp_path / "other", background=True).result()
    for file in (tmp_path / "one").iterdir():
        other = tmp_path / "other" / file.name
        if file.name in (".metadata", "checksums.json"):  # the one has a number of its own, the other one its checksum
            assert other.exists()
        else:
            assert other.read_bytes() == file.read_bytes()


def test_the_next_save_and_a_load_wait(tmp_path: Path, gate: threading.Event) -> None:
    model = compiled()
    first = geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=1, background=True)
    threading.Timer(0.2, gate.set).start()
    second = geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=2, background=True)
    assert first.done()
    assert geminifx.load_checkpoint(model, None, tmp_path / "saved") == 2
    assert second.done()


def test_a_save_that_is_not_in_the_background_is_done(tmp_path: Path) -> None:
    saving = geminifx.save_checkpoint(compiled(), None, tmp_path / "saved")
    assert saving.done()
    saving.result()


# -- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["result", "save", "load"])
def test_a_failure_of_the_thread_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    model, folder = compiled(), tmp_path / "saved"
    geminifx.save_checkpoint(model, None, folder, extra=1)
    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        saving = geminifx.save_checkpoint(model, None, folder, extra=2, background=True)
        ask = {
            "result": saving.result,
            "save": lambda: geminifx.save_checkpoint(model, None, folder, extra=3),
            "load": lambda: geminifx.load_checkpoint(model, None, folder),
        }[by]
        with pytest.raises(CheckpointError, match=r"No space left .* saved there before is intact"):
            ask()
    assert os.listdir(tmp_path) == ["saved"]
    assert geminifx.load_checkpoint(model, None, folder) == 1
    geminifx.save_checkpoint(model, None, folder, extra=4, background=True).result()
    assert geminifx.load_checkpoint(model, None, folder) == 4


def test_what_fails_before_all_is_copied_is_raised_by_the_call(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("...")
    model = compiled()
    with pytest.raises(CheckpointError, match="contains files that are not a checkpoint"):
        geminifx.save_checkpoint(model, None, tmp_path, background=True)
    with pytest.raises(CheckpointError, match="cannot be loaded without running code"):
        geminifx.save_checkpoint(model, None, tmp_path / "saved", extra={"f": full}, background=True)
    geminifx.save_checkpoint(model, None, tmp_path / "saved", background=True).result()


def test_a_copy_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = compiled()
    optimizer = OPTIMIZERS["own"](model)
    train(model, optimizer)
    tier = model.session.hardware.host_tier
    needed = sum(t.nbytes for t in model.state_dict().values()) + 2 * 4 * sum(p.numel() for p in model.parameters())
    planned = max(tier.used_bytes, model.plan.estimate.host_bytes)
    tier.limit_bytes = planned + needed - 1
    told = (
        rf"needs a copy of {needed:,} bytes, .* only {needed - 1:,} next to the {planned:,} that .* raise host_budget"
    )
    with pytest.raises(CheckpointError, match=told):
        geminifx.save_checkpoint(model, optimizer, tmp_path / "saved", background=True)
    assert os.listdir(tmp_path) == []
    tier.limit_bytes += 1
    before = tier.used_bytes
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved", background=True).result()
    assert tier.used_bytes == before


def test_what_training_takes_later_is_kept_free(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is offloaded nothing is on the host before the first step."""
    monkeypatch.setattr("geminifx.passes.offload.SMALLEST_BYTES", 1)
    case = zoo.Case("opt of four layers", lambda: zoo.opt(num_hidden_layers=4))
    model = zoo.compiled(case, placement="cuda", recompute="none", offload="all")
    model.session.placed()
    tier, planned = model.session.hardware.host_tier, model.plan.estimate.host_bytes
    needed = 4 * sum(p.numel() for p in model.parameters())
    assert tier.used_bytes < planned == model.plan.estimate.offloaded_bytes
    tier.limit_bytes = planned + needed - 1
    with pytest.raises(CheckpointError, match=rf"only {needed - 1:,} next to the {planned:,} that training uses"):
        geminifx.save_checkpoint(model, None, tmp_path / "saved", background=True)
    tier.limit_bytes += 1
    saving = geminifx.save_checkpoint(model, None, tmp_path / "saved", background=True)
    model(**zoo.OPT.batch()).loss.backward()
    assert not saving.done() and tier.peak_bytes <= tier.limit_bytes
    gate.set()
    saving.result()


INTERRUPTED = """
import signal, sys, threading, time
import geminifx, torch
from geminifx.runtime.state_io.background import Copying
folder = sys.argv[1]
model = geminifx.compile(torch.nn.Linear(6, 3), example_inputs=(torch.ones(8, 6),))
geminifx.save_checkpoint(model, None, folder, extra="old")
interrupted, told = threading.Event(), threading.Event()
copy, main = Copying._copy, threading.main_thread().ident
def once(*arguments):
    if not told.is_set():
        told.set()
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, once)
def waits_for_the_copy():
    frame, names = sys._current_frames()[main], []
    while frame is not None:
        names.append((frame.f_code.co_name, frame.f_globals["__name__"]))
        frame = frame.f_back
    return names[0][0] == "wait" and ("start", "threading") not in names  # which waits, too, until the thread runs
def slow(*arguments):
    if not interrupted.is_set():
        while not told.is_set():
            # One that falls between the thread's last operator and its wait would be told when that is over.
            if waits_for_the_copy():
                signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.01)
        assert interrupted.wait(60)
    return copy(*arguments)
Copying._copy = slow
try:
    geminifx.save_checkpoint(model, None, folder, extra="new", background=True)
except KeyboardInterrupt:
    interrupted.set()
    print(geminifx.load_checkpoint(model, None, folder))
"""


@pytest.mark.slow  # a process of its own: who has handled signals before does not matter
def test_ctrl_c_while_it_copies_leaves_no_half_of_a_checkpoint(tmp_path: Path) -> None:
    """The state may change from then on."""
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "saved")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "old\n"), ended.stderr
    assert os.listdir(tmp_path) == ["saved"]


# -- the end of the process --------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
import geminifx, torch
from geminifx.runtime.state_io.filesystem import Writer
folder, way = sys.argv[1:]
model = geminifx.compile(torch.nn.Linear(6, 3), example_inputs=(torch.ones(8, 6),))
geminifx.save_checkpoint(model, None, folder, extra="old")
write_data = Writer.write_data
def slow(*arguments):
    time.sleep(0.5)
    if way == "fails":
        raise OSError(28, "No space left on device")
    written = write_data(*arguments)
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return written
Writer.write_data = slow
geminifx.save_checkpoint(model, None, folder, extra="new", background=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "code", "left"), [("ends", 0, "new"), ("fails", 0, "old"), ("killed", -signal.SIGKILL, "old")]
)
def test_the_end_of_the_process_waits(tmp_path: Path, way: str, code: int, left: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), way]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert ("CheckpointError: could not save to" in ended.stderr) == (way == "fails"), ended.stderr
    model = geminifx.compile(torch.nn.Linear(6, 3), example_inputs=(torch.ones(8, 6),))
    assert geminifx.load_checkpoint(model, None, tmp_path / "saved") == left
