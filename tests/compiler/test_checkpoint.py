"""save_checkpoint and load_checkpoint in one process: exact, of either optimizer, and whole or not at all."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geminifx
import numpy as np
import pytest
import torch
from geminifx.runtime.isa.errors import CheckpointError
from torch import nn

OPTIMIZERS: dict[str, Callable[[geminifx.CompiledModule], torch.optim.Optimizer]] = {
    "own": lambda model: model.optimizer(torch.optim.AdamW, lr=1e-2),
    "torch's": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=1e-2),
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def compiled(seed: int = 0, precision: str | None = None, source: nn.Module | None = None) -> geminifx.CompiledModule:
    model = source or network(seed)
    return geminifx.compile(model, example_inputs=(torch.ones(8, 6),), precision=precision)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: geminifx.CompiledModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


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


def test_weights_on_meta_come_to_life(tmp_path: Path) -> None:
    model = compiled()
    geminifx.save_checkpoint(model, None, tmp_path / "saved")
    with geminifx.init_empty():
        empty = network()
    other = compiled(source=empty)
    optimizer = OPTIMIZERS["own"](other)
    with pytest.raises(geminifx.CheckpointError, match=r"no optimizer's state; load it with optimizer=None"):
        geminifx.load_checkpoint(other, optimizer, tmp_path / "saved")
    assert geminifx.load_checkpoint(other, None, tmp_path / "saved") is None
    assert same(values(other), values(model))
    assert train(other, optimizer) == train(model, OPTIMIZERS["own"](model))


def test_another_model_changes_nothing(tmp_path: Path) -> None:
    geminifx.save_checkpoint(compiled(), None, tmp_path / "saved")
    other = geminifx.compile(nn.Sequential(nn.Linear(6, 17)), example_inputs=(torch.ones(8, 6),))
    before = values(other)
    with pytest.raises(geminifx.CheckpointError, match=r"model\.0\.weight has shape \(17, 6\), .* shape \(16, 6\)"):
        geminifx.load_checkpoint(other, None, tmp_path / "saved")
    assert same(values(other), before)


def test_other_groups_are_refused(tmp_path: Path) -> None:
    model = compiled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    part = torch.optim.SGD([next(model.parameters())], lr=0.1)
    with pytest.raises(geminifx.CheckpointError, match=r"1 group\(s\) of 1 parameters, .* 1 of 6"):
        geminifx.load_checkpoint(model, part, tmp_path / "saved")


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


def test_what_is_no_checkpoint_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("...")
    with pytest.raises(geminifx.CheckpointError, match="holds files but no such checkpoint"):
        geminifx.save_checkpoint(compiled(), None, tmp_path)
    with pytest.raises(geminifx.CheckpointError, match="there is no checkpoint"):
        geminifx.load_checkpoint(compiled(), None, tmp_path)


KILLED = """
import os, signal, sys
import geminifx, torch
model = geminifx.compile(torch.nn.Linear(6, 3), example_inputs=(torch.ones(8, 6),))
geminifx.save_checkpoint(model, None, sys.argv[1], extra=1)
rename = os.rename
def dies_after(source, target):
    rename(source, target)
    if str(source) == os.path.realpath(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = dies_after
geminifx.save_checkpoint(model, None, sys.argv[1], extra=2)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_saves_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Killed when it has just moved the old one away, if that is how it saves. What is found is one or the other."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "saved")], timeout=120, check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    model = geminifx.compile(nn.Linear(6, 3), example_inputs=(torch.ones(8, 6),))
    assert geminifx.load_checkpoint(model, None, tmp_path / "saved") in (1, 2)


def test_numbers_of_numpy_come_back_as_numbers(tmp_path: Path) -> None:
    """Learning rates often are: the optimizer's groups are saved with them."""
    model = compiled()
    optimizer = model.optimizer(torch.optim.AdamW, lr=np.float64(0.125))
    train(model, optimizer)
    extra = {"best": np.float32(0.5), "seen": [np.int64(3), (True, "x")], "running": torch.arange(2)}
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved", extra=extra)
    found = geminifx.load_checkpoint(model, optimizer, tmp_path / "saved")
    assert found == {"best": 0.5, "seen": [3, (True, "x")], "running": found["running"]}
    assert found["running"].tolist() == [0, 1] and type(found["best"]) is float
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize(
    "extra", [np.ones(3), Path("x"), {"step": [object()]}], ids=["an array", "a path", "an object"]
)
def test_what_would_not_load_is_told_when_it_is_saved(tmp_path: Path, extra: Any) -> None:
    model = compiled()
    geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=1)
    with pytest.raises(CheckpointError, match="'extra' holds something of a type that does not load without running"):
        geminifx.save_checkpoint(model, None, tmp_path / "saved", extra=extra)
    assert geminifx.load_checkpoint(model, None, tmp_path / "saved") == 1
