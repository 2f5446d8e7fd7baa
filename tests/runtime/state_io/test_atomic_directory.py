"""A checkpoint's directory is the old one or the new one, whatever goes wrong in between."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from geminifx.runtime.state_io import atomic_directory as checkpoint
from geminifx.runtime.state_io.atomic_directory import atomic_directory, carry_over, save_weights
from safetensors.torch import load_file, load_model
from torch import nn


def write(directory: Path, text: str = "new") -> None:
    (directory / "sub").mkdir()
    (directory / "weights").write_text(text)
    (directory / "sub" / "more").write_text(text)


def contents(directory: Path) -> dict[str, str]:
    """Every file below `directory` with its text, hidden ones and leftovers included."""
    return {str(f.relative_to(directory)): f.read_text() for f in directory.rglob("*") if f.is_file()}


NEW = {"ck/weights": "new", "ck/sub/more": "new"}
OLD = {"ck/weights": "old", "ck/only": "old"}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "weights").write_text("old")
    (tmp_path / "ck" / "only").write_text("old")
    return tmp_path / "ck"


def test_a_new_directory_appears_whole_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "ck"
    with atomic_directory(target) as temporary:
        write(temporary)
        assert not target.exists()
    assert contents(tmp_path / "deep" / "er") == NEW
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_existing_directory_is_replaced(old: Path) -> None:
    with atomic_directory(str(old)) as temporary:
        write(temporary)
        assert contents(old.parent).items() >= OLD.items()
    assert contents(old.parent) == NEW
    assert os.listdir(old.parent) == ["ck"]


@pytest.mark.parametrize("error", [ValueError("in the body"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failing_body_changes_nothing(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_directory(old) as temporary:
        write(temporary)
        raise error
    assert contents(old.parent) == OLD and os.listdir(old.parent) == ["ck"]


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(NotADirectoryError, match="notes is a file"), atomic_directory(tmp_path / "notes"):
        pass
    assert (tmp_path / "notes").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "large disk" / "run").mkdir(parents=True)
    (tmp_path / "large disk" / "run" / "weights").write_text("old")
    (tmp_path / "run").symlink_to(tmp_path / "large disk" / "run")
    with atomic_directory(tmp_path / "run") as temporary:
        (temporary / "weights").write_text("new")
    assert (tmp_path / "run").is_symlink()
    assert [path.name for path in (tmp_path / "large disk").iterdir()] == ["run"]
    assert (tmp_path / "large disk" / "run" / "weights").read_text() == "new"


def test_a_failing_body_leaves_no_new_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic_directory(tmp_path / "ck") as temporary:
        write(temporary)
        raise ValueError
    assert os.listdir(tmp_path) == []


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_the_flush_changes_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"), atomic_directory(old) as temporary:
        write(temporary)
    assert contents(old.parent) == OLD and os.listdir(old.parent) == ["ck"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_whichever_rename_fails_the_old_checkpoint_is_at_its_place(
    old: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> None:
    original, calls = os.rename, iter(range(9))

    def rename(source: Any, target: Any) -> None:
        if next(calls) == number:
            raise error
        original(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", rename)
    with pytest.raises(type(error)), atomic_directory(old) as temporary:
        write(temporary)
    assert contents(old.parent) == OLD and os.listdir(old.parent) == ["ck"]


def test_an_interruption_while_the_old_one_is_removed_leaves_the_new_one(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = shutil.rmtree

    def rmtree(path: Any, **options: Any) -> None:
        if ".old." in str(path):
            raise KeyboardInterrupt
        original(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt), atomic_directory(old) as temporary:
        write(temporary)
    assert {f"ck/{name}": text for name, text in contents(old).items()} == NEW


def test_carry_over_keeps_other_files_but_no_weights(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for directory, names in ((a, ("tokenizer.json", "config.json", "model-2.safetensors", "x.bin")), (b, ())):
        directory.mkdir()
        for name in names:
            (directory / name).write_text("old")
    (a / "sub").mkdir()
    (a / "sub" / "notes").write_text("old")
    (b / "config.json").write_text("new")
    carry_over(a, b)
    assert contents(b) == {"config.json": "new", "tokenizer.json": "old", "sub/notes": "old"}
    carry_over(tmp_path / "nothing", b)


class Tied(nn.Module):
    """Two names for one weight; `packed` as in a chunk, where it lies in a larger storage."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        if packed:
            storage = torch.randn(64)
            self.a.weight.data = storage[:9].view(3, 3)
            self.b.bias.data = storage[32:35]


def test_tied_weights_are_saved_once_and_load_under_every_name(tmp_path: Path) -> None:
    model, other = Tied(packed=True), Tied(packed=False)
    save_weights(model.state_dict(), tmp_path)
    file = tmp_path / "model.safetensors"
    assert {name: t.numel() for name, t in load_file(file).items()} == {"a.weight": 9, "b.bias": 3}
    load_model(other, file)
    assert torch.equal(other.b.weight, model.a.weight) and torch.equal(other.b.bias, model.b.bias)
