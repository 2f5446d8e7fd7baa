"""save_checkpoint and load_checkpoint in one process: exact, of either optimizer, and whole or not at all."""

import copy
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import geminifx
import numpy as np
import pytest
import torch
from geminifx.runtime.isa.errors import CheckpointError, StateError
from saving import INPUTS, OPTIMIZERS, compiled, network, same, train, values
from torch import nn


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("before", "after"), [("own", "own"), ("torch's", "own"), ("torch's", "torch's"), ("NAdam", "NAdam")]
)
def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path, precision: str, before: str, after: str) -> None:
    model = compiled(precision=precision)
    optimizer = OPTIMIZERS[before](model)
    train(model, optimizer)
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved", extra={"step": 3})
    expected, losses = values(model), train(model, optimizer)
    other = compiled(seed=1, precision=precision)
    other_optimizer = OPTIMIZERS[after](other)
    assert geminifx.load_checkpoint(other, other_optimizer, tmp_path / "saved") == {"step": 3}
    assert same(values(other), expected)
    assert train(other, other_optimizer) == losses
    assert same(values(other), values(model))


@pytest.mark.parametrize("how", ["checkpoint", "state_dict"])
@pytest.mark.parametrize("kind", ["own", "torch's"])
def test_weights_of_16_bits_resume_right_after_they_are_made(tmp_path: Path, kind: str, how: str) -> None:
    """What is saved are masters of 32 bits, which their parameters cannot hold before they are planned for."""

    def made(**options: Any) -> tuple[geminifx.CompiledModule, Any]:
        model = geminifx.compile(network().bfloat16(), device="cpu", precision="bf16", **options)
        return model, OPTIMIZERS[kind](model)

    inputs = {"example_inputs": INPUTS}
    model, optimizer = made(**inputs)
    train(model, optimizer)
    if how == "checkpoint":
        geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    resumed, other = made(**inputs)
    if how == "checkpoint":
        geminifx.load_checkpoint(resumed, other, tmp_path / "saved")
    else:
        resumed.load_state_dict(weights)
        other.load_state_dict(state)
    assert train(resumed, other) == train(model, optimizer)
    assert same(values(resumed), values(model))
    unplanned, _ = made()
    with pytest.raises(StateError, match=r"is torch.bfloat16 until memory for training is planned"):
        unplanned.load_state_dict(weights)
    unplanned.load_state_dict(network().bfloat16().state_dict())  # which are held exactly


class Recurrent(nn.Module):
    """Its layer refers weakly to its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])


def test_recurrent_weights_on_meta_come_to_life() -> None:
    torch.manual_seed(0)
    plain, x = Recurrent(), torch.randn(2, 3, 6)
    with geminifx.init_empty():
        empty = Recurrent()
    model = geminifx.compile(empty, example_inputs=(x,))
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(x), plain(x))


def test_weights_on_meta_come_to_life(tmp_path: Path) -> None:
    model = compiled()
    geminifx.save_checkpoint(model, None, tmp_path / "saved")
    with geminifx.init_empty():
        empty = network()
    other = compiled(source=empty)
    optimizer = OPTIMIZERS["own"](other)
    with pytest.raises(geminifx.CheckpointError, match=r"no optimizer state; load it with optimizer=None"):
        geminifx.load_checkpoint(other, optimizer, tmp_path / "saved")
    assert geminifx.load_checkpoint(other, None, tmp_path / "saved") is None
    assert same(values(other), values(model))
    assert train(other, optimizer) == train(model, OPTIMIZERS["own"](model))


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    with pytest.raises(geminifx.CheckpointError, match=r"No space left .* saved there before is intact"):
        geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=2)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert geminifx.load_checkpoint(model, None, tmp_path / "saved") == 1


def test_an_interruption_stays_one_where_the_writer_fails_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # as torch's writer of archives does, when it is closed

    model = compiled()
    geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=1)
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", fail)
    with pytest.raises(KeyboardInterrupt):
        geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=2)
    assert geminifx.load_checkpoint(model, None, tmp_path / "saved") == 1


def test_a_save_that_fails_while_an_interruption_is_handled_tells_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    model = compiled()
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(geminifx.CheckpointError, match="No space left"):
            geminifx.save_checkpoint(model, None, tmp_path / "saved")


def test_what_is_no_checkpoint_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("...")
    with pytest.raises(geminifx.CheckpointError, match="contains files that are not a checkpoint"):
        geminifx.save_checkpoint(compiled(), None, tmp_path)
    with pytest.raises(geminifx.CheckpointError, match="there is no checkpoint"):
        geminifx.load_checkpoint(compiled(), None, tmp_path)


KILLED = """
import os, signal, sys
import geminifx, torch
from geminifx.runtime.state_io import exchange
if sys.argv[2] == "in two steps":
    exchange.exchange = lambda one, other: False
model = geminifx.compile(torch.nn.Linear(6, 3), example_inputs=(torch.ones(8, 6),))
geminifx.save_checkpoint(model, None, sys.argv[1], extra=1)
steps = {"in one step": (exchange, "exchange"), "in two steps": (os, "rename")}
place, name = steps[sys.argv[2]]
step = getattr(place, name)
def dies(one, other):
    step(one, other)
    if os.path.realpath(sys.argv[1]) in (str(one), str(other)):
        os.kill(os.getpid(), signal.SIGKILL)
setattr(place, name, dies)
geminifx.save_checkpoint(model, None, sys.argv[1], extra=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in one step", "in two steps"])
def test_a_process_that_is_killed_while_it_saves_leaves_a_checkpoint(tmp_path: Path, way: str) -> None:
    """Killed when the old one has just been moved away: what is found is one or the other."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "saved"), way], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "saved").exists() == (way == "in one step")
    model = geminifx.compile(nn.Linear(6, 3), example_inputs=(torch.ones(8, 6),))
    with warnings.catch_warnings(record=True) as told:
        assert geminifx.load_checkpoint(model, None, tmp_path / "saved") == 2
    assert any("a save was killed" in str(each.message) for each in told) == (way == "in two steps")
    geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=3)
    assert os.listdir(tmp_path) == ["saved"]


def test_numbers_of_numpy_come_back_as_numbers(tmp_path: Path) -> None:
    """Learning rates often are: the optimizer's groups are saved with them."""
    model = compiled()
    betas = np.float64(0.5), np.float64(0.75)
    optimizer = model.optimizer(torch.optim.AdamW, lr=np.float64(0.125), betas=betas, weight_decay=np.float32(0.5))
    train(model, optimizer)
    extra = {"best": np.float32(0.5), "seen": [np.int64(3), (True, "x")], "running": torch.arange(2)}
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved", extra=extra)
    found = geminifx.load_checkpoint(model, optimizer, tmp_path / "saved")
    assert found == {"best": 0.5, "seen": [3, (True, "x")], "running": found["running"]}
    assert found["running"].tolist() == [0, 1] and type(found["best"]) is float
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.125, (0.5, 0.75), 0.5)
    assert {type(value) for value in (group["lr"], *group["betas"], group["weight_decay"])} == {float}


@pytest.mark.parametrize(
    "extra",
    [np.ones(3), Path("x"), {"step": [object()]}, {"f": lambda: 0}, {np.float32(1)}, np.longdouble(1), sys.stdout],
    ids=["an array", "a path", "an object", "a function", "a set of numpy's", "a long double", "a file"],
)
def test_what_would_not_load_is_told_when_it_is_saved(tmp_path: Path, extra: Any) -> None:
    model = compiled()
    geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=1)
    with pytest.raises(
        CheckpointError, match="'extra' contains a value of a type that cannot be loaded without running"
    ):
        geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=extra)
    assert geminifx.load_checkpoint(model, None, tmp_path / "saved") == 1
