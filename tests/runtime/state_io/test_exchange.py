"""Two directories change places in one step, or it is told that they cannot."""

import ctypes
import errno
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from geminifx.runtime.state_io import exchange as module
from geminifx.runtime.state_io.exchange import exchange


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    return tmp_path / "a", tmp_path / "b"


def names(*folders: Path) -> list[str]:
    return [file.name for folder in folders for file in folder.iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other calls")
def test_they_change_places(two: tuple[Path, Path]) -> None:
    if exchange(*two):  # else the file system of this folder cannot
        assert names(*two) == ["b", "a"]
    else:
        assert names(*two) == ["a", "b"]


def test_what_is_not_there_is_an_error(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        exchange(two[0], tmp_path / "nothing")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, None])
def test_a_system_that_cannot_is_told_from_one_that_fails(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def renameat2(*_: Any) -> int:
        assert number is not None
        ctypes.set_errno(number)
        return -1

    library = SimpleNamespace() if number is None else SimpleNamespace(renameat2=renameat2)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: library)
    assert not exchange(*two)
    assert names(*two) == ["a", "b"]


def test_an_error_is_raised(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def renameat2(*_: Any) -> int:
        ctypes.set_errno(errno.EACCES)
        return -1

    monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=renameat2))
    with pytest.raises(PermissionError):
        exchange(*two)
